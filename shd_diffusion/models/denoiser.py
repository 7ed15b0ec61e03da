"""One way to call every denoiser: `predict(model, noised, timesteps, condition)`, and what a family needs for it.

A condition is a flat dict of tensors (B, ...), the keyword arguments of the model; a dot in a name nests
(`added_cond_kwargs.text_embeds`). A model without any is called with an empty one. A new family is one entry in
`FAMILIES`, or none where the model takes the noised sample, `timestep` in 0..T and its condition as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from shd_diffusion.attention.capture import unwrap

Condition: TypeAlias = Mapping[str, Tensor]
Arguments: TypeAlias = dict[str, Any]


def _unchanged(model: Any, timesteps: Tensor) -> Tensor:
    return timesteps


def _as_they_are(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    return arguments


@dataclass(frozen=True)
class Family:
    """How the denoisers of one class are called.

    Attributes:
        timesteps: (model, timesteps of the forward process, which count to T) to what the model is told.
        arguments: (model, noised, condition) to the model's keyword arguments: those that follow from the shape of
            the noised sample alone are added here.
        patch: side p of the p×p patches of a latent that the pipeline packs into one token; None: it packs none.
        not_conditions: the arguments that are no part of a condition: the timestep, and what `arguments` adds.
    """

    timesteps: Callable[[Any, Tensor], Tensor] = _unchanged
    arguments: Callable[[Any, Tensor, Arguments], Arguments] = _as_they_are
    patch: int | None = None
    not_conditions: frozenset[str] = frozenset({"timestep"})


def predict(model: nn.Module, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """What the denoiser predicts.

    Args:
        model: a diffusers model, possibly compiled or wrapped for distributed training.
        noised: x_t, (B, C, H, W), or (B, C, F, H, W) of a video.
        timesteps: (B,), in 0..T of the forward process.
        condition: tensors (B, ...) by argument of the model.

    Returns:
        (B, C', H, W); C' is 2C where the model also predicts a variance.
    """
    inner = unwrap(model)
    family = family_of(inner)
    arguments = family.arguments(inner, noised, _nested(condition))
    sample = noised if family.patch is None else pack(noised, family.patch)
    told = family.timesteps(inner, timesteps)
    prediction: Tensor = model(sample, timestep=told, **arguments, return_dict=False)[0]
    return prediction if family.patch is None else unpack(prediction, noised.shape[-2:], family.patch)


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


def family_of(model: nn.Module) -> Family:
    """The entry of the model's class or of the first of its base classes that has one."""
    return next(
        (FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), Family()
    )


def _nested(condition: Condition) -> Arguments:
    arguments: Arguments = {}
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


# --- arguments that follow from the shape ------------------------------------------------------------------------


def _one_hot_tokens(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """A UNet2DConditionModel attends to context tokens. diffusers' own `image_proj` makes 32 of them from one
    embedding of an image; from a one-hot label it makes 32 learned tokens a class."""
    if "class_labels" not in arguments or model.config.get("encoder_hid_dim_type") != "image_proj":
        return arguments
    one_hot = F.one_hot(arguments.pop("class_labels"), model.config["encoder_hid_dim"])
    added = arguments.pop("added_cond_kwargs", {}) | {"image_embeds": one_hot}
    return arguments | {"encoder_hidden_states": None, "added_cond_kwargs": added}


def _flux_positions(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Rotary positions (N, 3) of text tokens, all 0, and of patches: 0, row, column."""
    rows, columns = noised.shape[-2] // 2, noised.shape[-1] // 2
    grid = torch.zeros(rows, columns, 3, device=noised.device, dtype=noised.dtype)
    grid[..., 1] += torch.arange(rows, device=noised.device)[:, None]
    grid[..., 2] += torch.arange(columns, device=noised.device)
    text = arguments["encoder_hidden_states"].shape[1]
    return arguments | {"img_ids": grid.view(-1, 3), "txt_ids": grid.new_zeros(text, 3)}


def _qwen_shapes(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """(frames, rows, columns) of patches, an image each."""
    size = (1, noised.shape[-2] // 2, noised.shape[-1] // 2)
    return arguments | {"img_shapes": [[size]] * len(noised)}


def pack(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H·W/p², C·p²), as the pipelines of Flux and its relatives pack them."""
    return F.pixel_unshuffle(latents, patch).flatten(2).mT


def unpack(tokens: Tensor, size: torch.Size, patch: int) -> Tensor:
    """The inverse of `pack` for latents of this height and width."""
    height, width = size
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // patch, width // patch)), patch)


def _thousandths(model: Any, timesteps: Tensor) -> Tensor:
    """The model multiplies them by 1000 again."""
    return timesteps / 1000


def _scaled_by_config(model: Any, timesteps: Tensor) -> Tensor:
    return timesteps * model.config.timestep_scale


# What each family needs beyond its condition.
FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(arguments=_one_hot_tokens),
    "FluxTransformer2DModel": Family(
        _thousandths, _flux_positions, patch=2, not_conditions=frozenset({"timestep", "img_ids", "txt_ids"})
    ),
    "SanaTransformer2DModel": Family(_scaled_by_config),
    "QwenImageTransformer2DModel": Family(_thousandths, _qwen_shapes, patch=2),
}


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


def freeze(model: ModelMixin) -> ModelMixin:
    """Evaluation mode without gradients: the state in which a teacher teaches."""
    return model.eval().requires_grad_(False)
