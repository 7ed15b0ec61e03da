"""One way to call every denoiser: `predict(model, noised, timesteps, condition)`; families.py has what a family needs.

A condition is a flat dict of tensors (B, ...), the keyword arguments of the model; a dot in a name nests
(`added_cond_kwargs.text_embeds`). A model without any is called with an empty one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from shd_diffusion.attention.capture import unwrap
from shd_diffusion.models.families import TEXT_MASK, family_of, pack, unpack

Condition: TypeAlias = Mapping[str, Tensor]


def predict(model: nn.Module, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """What the denoiser predicts.

    Args:
        model: a diffusers model, possibly compiled or wrapped for distributed training.
        noised: x_t, (B, C, H, W), or (B, C, F, H, W) of a video.
        timesteps: (B,), in 0..T of the forward process.
        condition: tensors (B, ...) by argument of the model.

    Returns:
        What its pipeline gives its scheduler, (B, C', H, W); C' is 2C where the model also predicts a variance, which a
        scheduler gets only if it uses one.
    """
    inner = unwrap(model)
    family = family_of(inner)
    told = {name: value for name, value in condition.items() if name != TEXT_MASK}
    arguments = family.arguments(inner, noised, _nested(told))
    arguments[family.timestep] = family.timesteps(inner, timesteps)
    sample = noised if family.patch is None else pack(noised, family.patch)
    found = family.prediction(model(family.sample(sample), **arguments, return_dict=False)[0])
    return found if family.patch is None else unpack(found, noised.shape, family.patch)


def predict_frozen(model: ModelMixin, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """As `predict`, without gradients, of a model that may be on another device, in another precision."""
    device, dtype = model.device, model.dtype
    moved = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in condition.items()
    }
    with torch.no_grad():
        prediction = predict(model, noised.to(device, dtype), timesteps.to(device), moved)
    return prediction.to(noised.device)


def _nested(condition: Condition) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, value in condition.items():
        outer, dot, inner = name.partition(".")
        if dot:
            arguments.setdefault(outer, {})[inner] = value
        else:
            arguments[name] = value
    return arguments


# --- conditions -----------------------------------------------------------------------------------------------


def null_condition(model: nn.Module) -> dict[str, Tensor]:
    """What stands for no condition, (1, ...) by argument, where the model itself says so: the null class.

    Empty for a model that is not conditional by label; a text pipeline's null condition lies in its cache.
    """
    classes = num_classes(model)
    return {} if classes is None else {"class_labels": torch.tensor([classes])}


def drop_condition(condition: Condition, null: Condition, dropped: Tensor) -> dict[str, Tensor]:
    """The condition with the null condition in the samples that are `dropped`, (B,) bool.

    Where prompts are of any length, the shorter of both is padded with zeros, and its mask with False.
    """

    def replaced(name: str, value: Tensor) -> Tensor:
        if name not in null:  # such as a token mask, or sizes: nothing to drop
            return value
        where = dropped.to(value.device).view(-1, *[1] * (value.ndim - 1))
        other = null[name].to(value)
        if value.ndim > 1 and other.shape[1] != value.shape[1]:
            length = max(other.shape[1], value.shape[1])
            value, other = (_padded(each, length) for each in (value, other))
        return torch.where(where, other, value)

    return {name: replaced(name, value) for name, value in condition.items()}


NOT_DROPPED = frozenset(
    {"guidance", "original_size", "target_size", "crop_coords", "image_meta_size"}
    | {f"added_cond_kwargs.{name}" for name in ("time_ids", "resolution", "aspect_ratio")}
)
"""What is told of an image beside its prompt: it stays where the prompt is dropped."""


def _padded(value: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros up to (B, length, ...)."""
    return F.pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1]))


def pad(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """Conditions of one sample each, without a batch axis, as one of a batch, (B, ...) by argument.

    What differs in its first length is padded with zeros at its end; so are masks, where 0 is what does not count.
    """

    def padded(entries: list[Tensor]) -> Tensor:
        alike = len({entry.shape for entry in entries}) == 1
        return torch.stack(entries) if alike else pad_sequence(entries, batch_first=True)

    return {name: padded([condition[name] for condition in conditions]) for name in conditions[0]}


def num_classes(model: nn.Module) -> int | None:
    """Classes of a model that is conditional by label, whose null class is the next number; None for any other.

    A UNet2DModel has no null class of its own: its `num_class_embeds` counts one more than there are classes.
    """
    model = unwrap(model)
    config: Any = model.config
    if (
        config.get("encoder_hid_dim_type") == "image_proj"
    ):  # UNet2DConditionModel by label, see `_one_hot_tokens`
        return int(config["encoder_hid_dim"]) - 1
    if "class_labels" not in inspect.signature(type(model).forward).parameters:
        return None
    for key in ("num_embeds_ada_norm", "num_classes"):  # DiT, MDTv2
        if config.get(key):
            return int(config[key])
    # UNet2DModel has no null class of its own: the last one serves
    return int(config["num_class_embeds"]) - 1 if config.get("num_class_embeds") else None


# --- small facts --------------------------------------------------------------------------------------------------


def sample_shape(model: ModelMixin) -> tuple[int, int, int] | None:
    """Channels, height and width that the model's config is made for; None where it names no `sample_size`."""
    size = model.config.get("sample_size")
    if size is None:
        return None
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


def prepare(model: ModelMixin) -> ModelMixin:
    """The model, ready for prompts of different lengths in one batch; needed by CogView4 alone, whose own attention
    heeds no mask. Not inside a capture."""
    family_of(model).prepare(model)
    return model


def freeze(model: ModelMixin) -> ModelMixin:
    """Evaluation mode without gradients: the state in which a teacher teaches."""
    return model.eval().requires_grad_(False)
