"""Tiny autoencoders of large models' latent spaces (madebyollin/taesd), of which diffusers has all but the newest."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from safetensors.torch import load_file
from torch import Tensor, nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import replacing_folder

# diffusers loads a part of a pipeline only if its base stands in the same module.
__all__ = ["ModelMixin", "PooledAutoencoderTiny", "convert_taef2"]


class PooledBlock(AutoencoderTinyBlock):
    """A residual block that first adds what a group-normalised path of four times its width makes of its input.

    Args:
        channels: of its input and output, (B, channels, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, "relu")
        self.pool = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.GroupNorm(4, 4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


# The signature tells diffusers what a config may hold.
_SIGNED_AS_STOCK: Any = functools.wraps(AutoencoderTiny.__init__)


class PooledAutoencoderTiny(AutoencoderTiny):
    """TAEF2, the tiny autoencoder of Flux.2's latents: an AutoencoderTiny whose blocks at the lowest resolution are
    `PooledBlock`s. Arguments are those of AutoencoderTiny.
    """

    @_SIGNED_AS_STOCK
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        encoder, decoder = self.encoder.layers, self.decoder.layers
        _pool(encoder, _blocks(encoder)[-self.config.num_encoder_blocks[-1] :])
        _pool(decoder, _blocks(decoder)[: self.config.num_decoder_blocks[0]])


def convert_taef2(folder: Path, output: Path) -> None:
    """Write TAEF2's published weights as a diffusers model folder that `prepare.vae` takes, in float32.

    Args:
        folder: holds encoder.safetensors and decoder.safetensors.
        output: the new folder.

    Raises:
        UserError: `output` exists, or a file is missing, damaged, or holds other weights.
    """
    if output.exists():
        raise UserError(f"{output}: exists already; give another --to, or delete it")
    vae = PooledAutoencoderTiny(latent_channels=32)
    # The published decoder counts its clamping of latents as layer 0.
    for part, offset in (("encoder", 0), ("decoder", 1)):
        file = folder / f"{part}.safetensors"
        try:
            state = {_shift(name, -offset): value for name, value in load_file(file).items()}
            getattr(vae, part).layers.load_state_dict(state)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; give the folder that holds TAEF2's weights") from None
        except Exception as error:  # safetensors and torch raise errors of several kinds
            raise UserError(f"{file}: not the weights of TAEF2 ({one_line(error)})") from None
    with replacing_folder(output) as new:
        vae.save_pretrained(new)


def _blocks(layers: nn.Sequential) -> list[int]:
    return [index for index, layer in enumerate(layers) if isinstance(layer, AutoencoderTinyBlock)]


def _pool(layers: nn.Sequential, indices: list[int]) -> None:
    for index in indices:
        block: Any = layers[index]
        layers[index] = PooledBlock(block.conv[0].in_channels)


def _shift(name: str, by: int) -> str:
    """The name of a parameter whose layer is so many further on."""
    index, rest = name.split(".", 1)
    return f"{int(index) + by}.{rest}"
