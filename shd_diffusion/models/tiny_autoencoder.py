"""Tiny autoencoders of large models' latent spaces (madebyollin/taesd), of which diffusers has all but the newest."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import AutoencoderTiny, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn

# diffusers loads a part of a pipeline only if its base stands in the same module.
__all__ = ["ModelMixin", "PooledAutoencoderTiny"]


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

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **arguments: Any) -> Any:
        """Without a key that AutoencoderTiny adds to its own config, and that diffusers warns of when it loads it."""
        kept = {key: value for key, value in config_dict.items() if key != "block_out_channels"}
        return super().extract_init_dict(kept, **arguments)


def _blocks(layers: nn.Sequential) -> list[int]:
    return [index for index, layer in enumerate(layers) if isinstance(layer, AutoencoderTinyBlock)]


def _pool(layers: nn.Sequential, indices: list[int]) -> None:
    for index in indices:
        block: Any = layers[index]
        layers[index] = PooledBlock(block.conv[0].in_channels)
