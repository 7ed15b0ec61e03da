"""One way to call every class-conditional denoiser, and the few facts about it that the pipeline needs."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def predict(
    model: nn.Module, noised: Tensor, timesteps: Tensor, labels: Tensor, ids_keep: Tensor | None = None
) -> Tensor:
    """What the denoiser predicts.

    Args:
        model: a class-conditional diffusers model, possibly wrapped for distributed training.
        noised: (B, C, H, W).
        timesteps: (B,).
        labels: (B,); `null_label(model)` where the label is dropped.
        ids_keep: (B, K) tokens that a masked pass keeps, for a model with `num_tokens`; None: an ordinary pass.

    Returns:
        (B, C', H, W); C' is 2C where the model also predicts a variance.
    """
    masking = {} if ids_keep is None else {"ids_keep": ids_keep}
    return model(noised, timestep=timesteps, **_condition(model, labels), **masking).sample


def _condition(model: nn.Module, labels: Tensor) -> dict[str, Any]:
    """The labels as the model takes them.

    A UNet2DConditionModel attends to context tokens. diffusers' own `image_proj` makes 32 of them from one
    embedding of an image; from a one-hot label it makes 32 learned tokens a class.
    """
    unet = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(unet, UNet2DConditionModel):
        return {"class_labels": labels}
    one_hot = F.one_hot(labels, unet.config["encoder_hid_dim"])
    return {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": one_hot}}


def null_label(model: ModelMixin) -> int:
    """The label that stands for none, which is also the number of classes.

    Raises:
        ValueError: the model is not class-conditional.
    """
    config = model.config
    if isinstance(model, UNet2DConditionModel):
        if config["encoder_hid_dim_type"] != "image_proj":
            raise ValueError(
                "UNet2DConditionModel attends to a text as it is configured; for labels set "
                "encoder_hid_dim_type: image_proj and encoder_hid_dim: the number of classes + 1"
            )
        return config["encoder_hid_dim"] - 1
    if "class_labels" in inspect.signature(type(model).forward).parameters:
        for key in ("num_embeds_ada_norm", "num_classes"):  # DiT, MDTv2
            if getattr(config, key, None):
                return config[key]
        # UNet2D has no null class of its own: the last one serves
        if getattr(config, "num_class_embeds", None):
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


def num_tokens(model: ModelMixin) -> int:
    """Tokens of an image, for a model whose passes can be masked.

    Raises:
        ValueError: it takes no token mask.
    """
    if not hasattr(model, "num_tokens"):
        raise ValueError(f"{type(model).__name__} takes no token mask")
    return model.num_tokens


def count_parameters(model: nn.Module) -> int:
    """Number of scalars in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def freeze(model: ModelMixin) -> ModelMixin:
    """Evaluation mode without gradients: the state in which a teacher teaches."""
    return model.eval().requires_grad_(False)
