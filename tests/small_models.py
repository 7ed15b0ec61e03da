"""Models of a few thousand weights."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel


def small_dit(heads: int, head_dim: int = 8, layers: int = 2, out_channels: int = 1) -> DiTTransformer2DModel:
    """A class-conditional DiT on 8×8 images of one channel: 16 tokens, 10 classes."""
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        in_channels=1,
        out_channels=out_channels,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
