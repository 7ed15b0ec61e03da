"""How the denoisers of each class are called: what a family needs beside its condition.

A new family is one entry in `FAMILIES`, or none where the model takes the noised sample, `timestep` in 0..T and its
condition as they are. Each entry says what the family's diffusers pipeline does around its denoiser's call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.transformer_cogview4 import (
    CogView4AttnProcessor,
    CogView4TrainingAttnProcessor,
)
from torch import Tensor, nn

from shd_diffusion.operations import is_readable

Arguments: TypeAlias = dict[str, Any]

TEXT_MASK = "text_mask"
"""Of a condition, which of its text tokens are no padding, (B, L) bool. The model is not told, and attends to all; but
query rows of padding count in no loss."""


@dataclass(frozen=True)
class Family:
    """How the denoisers of one class are called.

    Attributes:
        timesteps: (model, timesteps of the forward process, which count to T) to what the model is told.
        arguments: (model, noised, condition) to the model's keyword arguments: those that follow from the shape of
            the noised sample alone are added here.
        patch: side p of the p×p patches of a latent that the pipeline packs into one token; None: it packs none.
        sample: the noised sample, packed or not, as the model takes it.
        prediction: what the model gives, unpacked or not, as the pipeline gives it its scheduler.
        timestep: the name of that argument.
        derived: the arguments that `arguments` adds; they are no part of a condition.
        condition: what is made of one sample's arguments, as a pipeline tells them, to have its condition.
        prepare: what is done to a model before prompts of different lengths share its batches.
        text: the pipeline's tokenizers whose tokens, one after another, are the text of its joint attention, where the
            model is not told which of them are padding and attends to all: see `TEXT_MASK`.
        registers: so many learned tokens the model puts before them.
    """

    timesteps: Callable[[Any, Tensor], Tensor] = lambda model, timesteps: timesteps
    arguments: Callable[[Any, Tensor, Arguments], Arguments] = lambda model, noised, arguments: arguments
    patch: int | None = None
    sample: Callable[[Tensor], Any] = lambda noised: noised
    prediction: Callable[[Any], Tensor] = lambda found: found
    timestep: str = "timestep"
    derived: tuple[str, ...] = ()
    condition: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda told: told
    prepare: Callable[[Any], None] = lambda model: None
    text: tuple[str, ...] = ()
    registers: int = 0


def family_of(model: nn.Module) -> Family:
    """The entry of the model's class or of the first of its base classes that has one."""
    return next(
        (FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), Family()
    )


# --- samples --------------------------------------------------------------------------------------------------


def pack(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H·W/p², C·p²), as the pipelines of Flux and its relatives pack them.

    Where latents are those of videos, an image is one frame: (B, C, 1, H, W).
    """
    latents = latents.squeeze(2) if latents.ndim == 5 else latents
    return F.pixel_unshuffle(latents, patch).flatten(2).mT


def unpack(tokens: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """The inverse of `pack` for latents of this shape, of which height and width are enough."""
    height, width = shape[-2:]
    latents = F.pixel_shuffle(tokens.mT.unflatten(2, (height // patch, width // patch)), patch)
    return latents.unsqueeze(2) if len(shape) == 5 else latents


def _frames(noised: Tensor) -> list[Tensor]:
    """A list of (C, F, H, W), of one frame each."""
    return list(noised.unsqueeze(2).unbind())


def _negated_frames(found: list[Tensor]) -> Tensor:
    return -torch.stack(found).squeeze(2)


def _negated(found: Tensor) -> Tensor:
    """The model predicts from noise to data, a scheduler wants it from data to noise."""
    return -found


# --- timesteps ------------------------------------------------------------------------------------------------


def _thousandths(model: Any, timesteps: Tensor) -> Tensor:
    """The model multiplies them by 1000 again."""
    return timesteps / 1000


def _backwards(model: Any, timesteps: Tensor) -> Tensor:
    """0 is noise, 1 is data."""
    return 1 - timesteps / 1000


def _scaled_by_config(model: Any, timesteps: Tensor) -> Tensor:
    return timesteps * model.config.timestep_scale


def _in_precision_of_model(model: Any, timesteps: Tensor) -> Tensor:
    """The model computes its embedding in the timesteps' own precision."""
    return timesteps.to(model.dtype)


# --- arguments ------------------------------------------------------------------------------------------------


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


def _ovis_positions(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Flux's, but a text token stands in the row and the column of its number."""
    arguments = _flux_positions(model, noised, arguments)
    text: Tensor = arguments["txt_ids"]
    text[:, 1:] += torch.arange(len(text), device=text.device)[:, None]
    return arguments


def _flux2_positions(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Rotary positions (N, 4): 0, row and column of an image token, and the place of a text token."""
    ranges = [torch.arange(size, device=noised.device) for size in (1, *noised.shape[-2:])]
    place = torch.arange(arguments["encoder_hidden_states"].shape[1], device=noised.device)
    zero = ranges[0]
    return arguments | {
        "img_ids": torch.cartesian_prod(*ranges, zero),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, place),
    }


def _chroma_positions(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Flux's, and a mask that goes on over the image's tokens."""
    arguments = _flux_positions(model, noised, arguments)
    mask = arguments["attention_mask"]
    image = mask.new_ones(len(mask), len(arguments["img_ids"]))
    return arguments | {"attention_mask": torch.cat([mask, image], 1)}


def _mask_of_text(told: dict[str, Tensor]) -> dict[str, Tensor]:
    return told | {"attention_mask": told["attention_mask"][: len(told["encoder_hidden_states"])]}


def _qwen_shapes(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """(frames, rows, columns) of patches, an image each."""
    size = (1, noised.shape[-2] // 2, noised.shape[-1] // 2)
    return arguments | {"img_shapes": [[size]] * len(noised)}


def _hunyuan_positions(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Rotary embedding of patches in a grid that is centred in that of 512 pixels."""
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import (  # which needs transformers
        get_resize_crop_region_for_grid,
    )

    patch = model.config.patch_size
    grid = noised.shape[-2] // patch, noised.shape[-1] // patch
    region = get_resize_crop_region_for_grid(grid, 512 // 8 // patch)
    width = model.inner_dim // model.num_heads
    rotary = get_2d_rotary_pos_embed(width, region, grid, device=noised.device, output_type="pt")
    return arguments | {"image_rotary_emb": rotary}


def _with_mask(text: str, mask: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """All of a prompt's tokens count: what a pipeline does not say of one prompt, and a batch of several needs."""

    def condition(told: dict[str, Tensor]) -> dict[str, Tensor]:
        return told if mask in told else told | {mask: torch.ones(len(told[text]), dtype=torch.bool)}

    return condition


def _listed(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Text as a list of (tokens, channels), a prompt each."""
    text, mask = arguments["cap_feats"], arguments.pop("cap_feats_mask")
    lengths = mask.sum(1).tolist()
    return arguments | {"cap_feats": [tokens[:length] for tokens, length in zip(text, lengths, strict=True)]}


# --- CogView4's mask ------------------------------------------------------------------------------------------


class MaskedCogView4AttnProcessor(CogView4AttnProcessor):
    """CogView4's attention with a text mask that masks.

    diffusers' default processor adds its mask's ones and zeros to the logits, which hides nothing; the one that it
    has for training multiplies them out. This one is the default without a mask, and the other with one.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is None:
            found: tuple[Tensor, Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, None, image_rotary_emb
            )
            return found
        masked: tuple[Tensor, Tensor] = CogView4TrainingAttnProcessor()(
            attn,
            hidden_states,
            encoder_hidden_states,
            text_attn_mask=attention_mask.to(torch.int32),
            image_rotary_emb=image_rotary_emb,
        )
        return masked


def _take_masks(model: Any) -> None:
    for block in model.transformer_blocks:
        if not _takes_masks(block):
            block.attn1.set_processor(MaskedCogView4AttnProcessor())


def _takes_masks(block: Any) -> bool:
    return isinstance(block.attn1.processor, MaskedCogView4AttnProcessor)


def _mask_if_needed(model: Any, noised: Tensor, arguments: Arguments) -> Arguments:
    """Raises ValueError: prompts are of different lengths, and the model would not see their mask."""
    mask = arguments.get("attention_mask")
    if mask is None or not is_readable(mask) or mask.all():  # the fast kernels take none
        return {name: value for name, value in arguments.items() if name != "attention_mask"}
    if not all(map(_takes_masks, model.transformer_blocks)):
        raise ValueError(
            f"prompts of different lengths in one batch: call `prepare` on the {type(model).__name__} first"
        )
    return arguments


# --- the table ------------------------------------------------------------------------------------------------

_POSITIONS = ("img_ids", "txt_ids")

# What each family needs beyond its condition.
FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": Family(text=("tokenizer", "tokenizer_3")),
    "UNet2DConditionModel": Family(arguments=_one_hot_tokens),
    "HunyuanDiT2DModel": Family(
        timesteps=_in_precision_of_model, arguments=_hunyuan_positions, derived=("image_rotary_emb",)
    ),
    "FluxTransformer2DModel": Family(
        timesteps=_thousandths,
        arguments=_flux_positions,
        patch=2,
        derived=_POSITIONS,
        text=("tokenizer_2",),
    ),
    "Flux2Transformer2DModel": Family(
        timesteps=_thousandths,
        arguments=_flux2_positions,
        patch=1,  # its VAE's latents are patches already
        derived=_POSITIONS,
        text=("tokenizer",),
    ),
    "OvisImageTransformer2DModel": Family(
        timesteps=_thousandths,
        arguments=_ovis_positions,
        patch=2,
        derived=_POSITIONS,
        text=("tokenizer",),
    ),
    "ChromaTransformer2DModel": Family(
        timesteps=_thousandths,
        arguments=_chroma_positions,
        patch=2,
        derived=_POSITIONS,
        condition=_mask_of_text,  # a bias, which hides nothing
        text=("tokenizer",),
    ),
    "SanaTransformer2DModel": Family(timesteps=_scaled_by_config),
    "QwenImageTransformer2DModel": Family(
        timesteps=_thousandths,
        arguments=_qwen_shapes,
        patch=2,
        derived=("img_shapes",),
        condition=_with_mask("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "Lumina2Transformer2DModel": Family(timesteps=_backwards, prediction=_negated),
    "PRXTransformer2DModel": Family(timesteps=_thousandths),
    "AuraFlowTransformer2DModel": Family(timesteps=_thousandths, text=("tokenizer",), registers=8),
    "CogView4Transformer2DModel": Family(
        arguments=_mask_if_needed,
        condition=_with_mask("encoder_hidden_states", "attention_mask"),
        prepare=_take_masks,
    ),
    "ZImageTransformer2DModel": Family(
        timesteps=_backwards,
        arguments=_listed,
        sample=_frames,
        prediction=_negated_frames,
        timestep="t",
        condition=_with_mask("cap_feats", "cap_feats_mask"),
    ),
}
