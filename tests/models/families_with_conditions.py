"""Tiny models of every family that can be taught, with what their pipelines call them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from families import FAMILIES
from families import Family as CapturedFamily
from torch import Tensor

from shd_diffusion.models.denoiser import Condition

TEXT = 5
WITH_SIZES = {"use_additional_conditions": True, "out_channels": 8}  # as PixArt α at 1024 pixels


def _labels(samples: int) -> Condition:
    return {"class_labels": torch.tensor([1, 3])[:samples]}


def _text(samples: int) -> Condition:
    return {"encoder_hidden_states": torch.randn(samples, TEXT, 6)}


def _padding(samples: int) -> Tensor:
    """The first sample's prompt is short."""
    mask = torch.ones(samples, TEXT, dtype=torch.bool)
    mask[0, 3:] = False
    return mask


def _as_named(model: ModelMixin, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return model(x, t, **c, return_dict=False)[0]


def _sdxl(model: ModelMixin, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    added = {name: c[f"added_cond_kwargs.{name}"] for name in ("text_embeds", "time_ids")}
    text = c["encoder_hidden_states"]
    return model(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def _pixart(model: ModelMixin, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return model(
        x,
        encoder_hidden_states=c["encoder_hidden_states"],
        encoder_attention_mask=c["encoder_attention_mask"],
        timestep=t,
        added_cond_kwargs={
            name: c.get(f"added_cond_kwargs.{name}") for name in ("resolution", "aspect_ratio")
        },
        return_dict=False,
    )[0]


def _unet_by_label(model: ModelMixin, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    one_hot = torch.nn.functional.one_hot(c["class_labels"], 6)
    return model(x, t, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": one_hot}).sample


def _packed(pipeline: Any, model: ModelMixin, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """By the pipeline's own packing, with a VAE of stride 8 around it."""
    batch, channels, height, width = x.shape
    found = call(pipeline._pack_latents(x, batch, channels, height, width))
    unpacked: Tensor = pipeline._unpack_latents(found, 8 * height, 8 * width, 8)
    return unpacked.view(x.shape)  # QwenImage's is a video of one frame


def _flux(model: ModelMixin, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    pipeline, (height, width) = diffusers.FluxPipeline, x.shape[-2:]
    ids = pipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype)
    rest = {"txt_ids": torch.zeros(TEXT, 3), "img_ids": ids, "return_dict": False}
    return _packed(pipeline, model, x, lambda tokens: model(tokens, timestep=t / 1000, **c, **rest)[0])


def _qwen(model: ModelMixin, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
    rest = {"img_shapes": shapes, "return_dict": False}
    return _packed(
        diffusers.QwenImagePipeline, model, x, lambda tokens: model(tokens, timestep=t / 1000, **c, **rest)[0]
    )


@dataclass(frozen=True)
class Taught:
    """A family with a condition.

    Attributes:
        family: its class and arguments.
        by_heads: the arguments that follow from the number of heads.
        condition: of so many samples, drawn anew at each call.
        direct: as its diffusers pipeline calls it.
        shape: of a sample.
        flow: whether its timesteps are σ·T.
        exact: whether `predict` equals the direct call bit for bit; no, where the pipeline divides timesteps by 1000.
    """

    family: CapturedFamily
    by_heads: Callable[[int], dict[str, Any]] = lambda heads: {"num_attention_heads": heads}
    condition: Callable[[int], Condition] = _labels
    direct: Callable[[ModelMixin, Tensor, Tensor, Condition], Tensor] = _as_named
    shape: tuple[int, ...] = (4, 8, 8)
    flow: bool = False
    exact: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, heads: int, seed: int = 0) -> ModelMixin:
        """A model whose every parameter is random."""
        torch.manual_seed(seed)
        arguments = self.family.arguments | self.arguments | self.by_heads(heads)
        model = self.family.model(**arguments)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def draw(self, samples: int = 2) -> tuple[Tensor, Tensor, Condition]:
        """Noised samples, timesteps, and their condition."""
        torch.manual_seed(1)
        noised = torch.randn(samples, *self.shape)
        timesteps = torch.tensor([30.5, 700.25] if self.flow else [3, 700])[:samples]
        return noised, timesteps, self.condition(samples)


def _unet(**arguments: Any) -> CapturedFamily:
    unet = FAMILIES["unet2d-condition"]
    return replace(unet, arguments=unet.arguments | arguments)


def _heads_of_unet(heads: int) -> dict[str, Any]:
    return {"attention_head_dim": heads}  # as diffusers misnames it


def _widths_of_unet2d(heads: int) -> dict[str, Any]:
    return {"attention_head_dim": 16 // heads}


TAUGHT: dict[str, Taught] = {
    "DiT": Taught(FAMILIES["dit"]),
    "MDTv2": Taught(FAMILIES["mdtv2"]),
    "MDTv2 masked": Taught(
        FAMILIES["mdtv2"],
        condition=lambda n: {**_labels(n), "ids_keep": torch.rand(n, 16).argsort(dim=1)[:, :7]},
    ),
    "SD 1.5": Taught(_unet(), _heads_of_unet, _text),
    "SDXL": Taught(
        _unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 6,
        ),
        _heads_of_unet,
        lambda n: {
            **_text(n),
            "added_cond_kwargs.text_embeds": torch.randn(n, 6),
            "added_cond_kwargs.time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * n),
        },
        _sdxl,
    ),
    "PixArt": Taught(
        FAMILIES["pixart"],
        lambda heads: {"num_attention_heads": heads, "cross_attention_dim": 8 * heads},
        lambda n: {**_text(n), "encoder_attention_mask": _padding(n)},
        _pixart,
    ),
    "PixArt with sizes": Taught(
        FAMILIES["pixart"],
        # a third of the width embeds the aspect ratio
        lambda heads: {
            "num_attention_heads": heads,
            "attention_head_dim": 12,
            "cross_attention_dim": 12 * heads,
        },
        lambda n: {
            **_text(n),
            "encoder_attention_mask": _padding(n),
            "added_cond_kwargs.resolution": torch.tensor([[64.0, 64.0]] * n),
            "added_cond_kwargs.aspect_ratio": torch.ones(n, 1),
        },
        _pixart,
        arguments=WITH_SIZES,
    ),
    "SD3": Taught(
        FAMILIES["sd3"],
        lambda heads: {"num_attention_heads": heads, "caption_projection_dim": 8 * heads},
        lambda n: {**_text(n), "pooled_projections": torch.randn(n, 4)},
        lambda model, x, t, c: model(x, timestep=t, **c, return_dict=False)[0],
        flow=True,
    ),
    "Flux": Taught(
        FAMILIES["flux"],
        condition=lambda n: {
            **_text(n),
            "pooled_projections": torch.randn(n, 4),
            "guidance": torch.full((n,), 3.5),
        },
        direct=_flux,
        flow=True,
        exact=False,
        arguments={"in_channels": 16, "guidance_embeds": True},
    ),
    "QwenImage": Taught(
        FAMILIES["qwen-image"],
        condition=lambda n: {**_text(n), "encoder_hidden_states_mask": _padding(n)},
        direct=_qwen,
        flow=True,
        exact=False,
        arguments={"in_channels": 16, "out_channels": 4},
    ),
    "Wan": Taught(
        FAMILIES["wan"],
        condition=_text,
        direct=lambda model, x, t, c: model(x, timestep=t, **c, return_dict=False)[0],
        shape=(4, 2, 4, 4),
        flow=True,
    ),
    "Sana": Taught(
        FAMILIES["sana"],
        lambda heads: {
            "num_attention_heads": 3,
            "num_cross_attention_heads": heads,
            "cross_attention_head_dim": 24 // heads,
        },
        condition=lambda n: {**_text(n), "encoder_attention_mask": _padding(n)},
        direct=lambda model, x, t, c: model(
            x, timestep=t * model.config.timestep_scale, **c, return_dict=False
        )[0],
        flow=True,
    ),
    "UNet2DModel": Taught(FAMILIES["unet2d"], _widths_of_unet2d, lambda n: {}),
    "UNet2DModel by class": Taught(FAMILIES["unet2d"], _widths_of_unet2d, arguments={"num_class_embeds": 6}),
    "UNet2DConditionModel by label": Taught(
        _unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=6), _heads_of_unet, direct=_unet_by_label
    ),
}
"""Every family, by the name of its models."""
