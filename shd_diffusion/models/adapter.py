"""One way to call every class-conditional denoiser, and the few facts about it that the pipeline needs."""

from __future__ import annotations

from diffusers import ModelMixin
from torch import Tensor, nn


def predict(model: nn.Module, noised: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """What the denoiser predicts.

    Args:
        model: a class-conditional diffusers model, possibly wrapped for distributed training.
        noised: (B, C, H, W).
        timesteps: (B,).
        labels: (B,); `null_label(model)` where the label is dropped.

    Returns:
        (B, C', H, W); C' is 2C where the model also predicts a variance.
    """
    return model(noised, timestep=timesteps, class_labels=labels).sample


def null_label(model: ModelMixin) -> int:
    """The label that stands for none, which is also the number of classes.

    Raises:
        ValueError: the model is not class-conditional.
    """
    config = model.config
    for key in ("num_embeds_ada_norm", "num_classes"):  # DiT, MDTv2
        if getattr(config, key, None):
            return config[key]
    if getattr(
        config, "num_class_embeds", None
    ):  # UNets have no null class of their own: the last one serves
        return config["num_class_embeds"] - 1
    raise ValueError(f"{type(model).__name__} is not class-conditional")


def sample_shape(model: ModelMixin) -> tuple[int, int, int]:
    """Channels, height and width of what the model denoises.

    Raises:
        ValueError: the model's config names no `sample_size`.
    """
    size = getattr(model.config, "sample_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no `sample_size` in its config")
    height, width = (size, size) if isinstance(size, int) else size
    return model.config["in_channels"], height, width


def count_parameters(model: nn.Module) -> int:
    """Number of scalars in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def freeze(model: ModelMixin) -> ModelMixin:
    """Evaluation mode without gradients: the state in which a teacher teaches."""
    return model.eval().requires_grad_(False)
