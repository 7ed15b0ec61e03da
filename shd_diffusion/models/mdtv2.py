"""MDTv2, the masked diffusion transformer (Gao et al., arXiv 2303.14389v2), as a diffusers model.

    patches ─► [drop tokens] ─► in-blocks ─► out-blocks ─► [side interpolater] ─► decoder blocks ─► noise
        │                          └─ long skips ─┘                                     ▲
        └───────────────────────── one skip to every decoder block ─────────────────────┘

What stands in brackets happens only when `ids_keep` is given: the encoder sees the kept tokens alone, and the
side interpolater predicts the others from them. The function computed is that of sail-sg/MDT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

# Constructor arguments of the published sizes. The authors train S with 6 decoder blocks and XL with 4; they
# published no recipe for B, which here follows S, the other size of 12 blocks.
MDTV2_SIZES: dict[str, dict[str, int]] = {
    "S/2": {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "num_decoder_layers": 6},
    "B/2": {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12, "num_decoder_layers": 6},
    "XL/2": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "num_decoder_layers": 4},
}


def num_kept_tokens(num_tokens: int, mask_ratio: float, generator: torch.Generator) -> int:
    """How many tokens a masked training step keeps: as the authors train, one ratio a batch, uniform in
    [mask_ratio, mask_ratio + 0.2].

    Args:
        num_tokens: N, all tokens of an image; `model.num_tokens`.
        mask_ratio: least share of tokens that are dropped; 0.3 in the paper.
        generator: source of the draw.

    Raises:
        ValueError: the ratio is negative, or could leave no token.
    """
    if mask_ratio < 0 or int(num_tokens * (0.8 - mask_ratio)) < 1:
        raise ValueError(f"mask_ratio {mask_ratio} must be at least 0 and leave some of {num_tokens} tokens")
    return int(num_tokens * (1 - mask_ratio - 0.2 * torch.rand(1, generator=generator).item()))


class BiasedAttnProcessor:
    """Self-attention by SDPA with an additive bias that is broadcast over the batch instead of copied."""

    def __call__(
        self,
        attn: BiasedAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: Tensor,
    ) -> Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, H, N, d)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


class BiasedAttention(Attention):
    """diffusers' self-attention, called with a bias of (1 or B, H, N, N) on its logits."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads=heads, dim_head=dim // heads, bias=True, processor=BiasedAttnProcessor())

    def prepare_attention_mask(
        self, attention_mask: Tensor, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor:
        """What diffusers' own processors ask for, should one be set: (B·H, N, N), or (B, H, N, N)."""
        bias = attention_mask.expand(batch_size, -1, -1, -1)
        return bias if out_dim == 4 else bias.flatten(0, 1)


class RelativePositionBias(nn.Module):
    """A learned bias a head for every offset between two tokens of a square grid.

    The table ends in three rows that are never read: its layout, BEiT's, keeps them for a class token.
    """

    relative_index: Tensor

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
        row, column = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
        offset = row[:, None] - row + grid - 1, column[:, None] - column + grid - 1
        self.register_buffer("relative_index", offset[0] * (2 * grid - 1) + offset[1], persistent=False)

    def forward(self, ids_keep: Tensor | None = None) -> Tensor:
        """The bias among all tokens, (1, H, N, N), or among the kept ones, (B, H, K, K)."""
        if ids_keep is None:
            index = self.relative_index[None]
        else:
            index = self.relative_index[ids_keep[:, :, None], ids_keep[:, None, :]]
        return F.embedding(index, self.table).permute(0, 3, 1, 2).contiguous()


class MDTv2Block(nn.Module):
    """A DiT block (adaLN-zero) with relative position bias and, optionally, a skip that is concatenated."""

    def __init__(self, dim: int, heads: int, grid: int, skip: bool) -> None:
        super().__init__()
        if skip:
            self.skip = nn.Linear(2 * dim, dim)
        self.norm1 = AdaLayerNormZero(dim)
        self.position_bias = RelativePositionBias(grid, heads)
        self.attn = BiasedAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(
        self, x: Tensor, condition: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C) and condition (B, C) to (B, N, C); x are the tokens `ids_keep` (B, N), or else all."""
        if skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        normed, gate_attn, shift, scale, gate_ff = self.norm1(x, emb=condition)
        x = x + gate_attn[:, None] * self.attn(normed, attention_mask=self.position_bias(ids_keep))
        return x + gate_ff[:, None] * self.ff(self.norm2(x) * (1 + scale[:, None]) + shift[:, None])


class MDTv2Transformer2DModel(ModelMixin, ConfigMixin):
    """MDTv2 as published, called as diffusers' `DiTTransformer2DModel` is.

    Labels are never dropped inside: the null label is `num_embeds_ada_norm`, and whoever trains drops labels
    once for teacher and student. The side block and the mask token take part only where `ids_keep` is given.

    Args:
        num_attention_heads: H.
        attention_head_dim: d; the model is C = H·d wide.
        in_channels: channels of the noised latent.
        out_channels: channels of the prediction, twice `in_channels` where it has a variance; None: as many.
        num_layers: blocks of encoder and decoder together, the side block not counted.
        num_decoder_layers: blocks of the decoder; the others are half in-blocks, half out-blocks.
        sample_size: height and width of the latent, in latent pixels.
        patch_size: latent pixels a token, each way.
        num_embeds_ada_norm: number of classes.

    Raises:
        ValueError: the encoder's blocks cannot be halved, or patches do not tile the sample.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: list[str] = ["MDTv2Block"]  # noqa: RUF012 -- the name and type that diffusers looks for
    _skip_layerwise_casting_patterns: list[str] = ["patch_embed", "position", "norm"]  # noqa: RUF012
    _gradient_checkpointing_func: Callable[..., Any]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_decoder_layers: int = 4,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
    ) -> None:
        super().__init__()
        encoder_layers = num_layers - num_decoder_layers
        if encoder_layers < 0 or encoder_layers % 2:
            raise ValueError(
                f"num_layers {num_layers} less num_decoder_layers {num_decoder_layers} is {encoder_layers}: "
                "the encoder needs an even number of blocks"
            )
        if sample_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide sample_size {sample_size}")
        dim, grid = num_attention_heads * attention_head_dim, sample_size // patch_size
        self.num_tokens = grid * grid
        self.out_channels = out_channels or in_channels
        self.gradient_checkpointing = False

        def blocks(count: int, skip: bool) -> nn.ModuleList:
            return nn.ModuleList(MDTv2Block(dim, num_attention_heads, grid, skip) for _ in range(count))

        self.patch_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, dim, pos_embed_type=None
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        self.decoder_position_embedding = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.label_embedder = nn.Embedding(num_embeds_ada_norm + 1, dim)  # the last row is the null label's
        self.in_blocks = blocks(encoder_layers // 2, skip=False)
        self.out_blocks = blocks(encoder_layers // 2, skip=True)
        self.side_block = MDTv2Block(dim, num_attention_heads, grid, skip=False)
        self.decoder_blocks = blocks(num_decoder_layers, skip=True)
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size**2 * self.out_channels)
        self._initialise(grid)

    def _initialise(self, grid: int) -> None:
        """The authors' initialisation: every block is the identity and the output is zero (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a linear layer on patches
        nn.init.zeros_(self.patch_embed.proj.bias)
        for weight in (
            self.label_embedder.weight,
            self.timestep_embedder.linear_1.weight,
            self.timestep_embedder.linear_2.weight,
            self.mask_token,
        ):
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, RelativePositionBias):
                nn.init.trunc_normal_(module.table, std=0.02)
            elif isinstance(module, AdaLayerNormZero):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out_1.weight)
        nn.init.zeros_(self.proj_out_2.weight)
        sincos = get_2d_sincos_pos_embed(self.mask_token.shape[-1], grid, base_size=grid)
        for embedding in (self.position_embedding, self.decoder_position_embedding):
            embedding.data.copy_(sincos)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        ids_keep: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (and, with twice the channels, its variance).

        Args:
            hidden_states: (B, in_channels, sample_size, sample_size), the noised latent.
            timestep: (B,), in training timesteps.
            class_labels: (B,), int64; `num_embeds_ada_norm` where the label is dropped.
            ids_keep: (B, K) distinct tokens that the encoder sees, in any order; None for all.
            return_dict: False returns a tuple instead of a `Transformer2DModelOutput`.

        Returns:
            `.sample` of (B, out_channels, sample_size, sample_size).

        Raises:
            ValueError: the latent has another size than the position embeddings.
        """
        size, given = self.config["sample_size"], tuple(hidden_states.shape[-2:])
        if given != (size, size):
            raise ValueError(f"latents are {given[0]}×{given[1]}, this model is for {size}×{size}")
        patches = self.patch_embed(hidden_states) + self.position_embedding
        frequencies = self.time_proj(timestep).to(patches.dtype)
        condition = self.timestep_embedder(frequencies) + self.label_embedder(class_labels)

        x = patches if ids_keep is None else patches.gather(1, _over_channels(ids_keep, patches))
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x, condition, None, ids_keep)
            skips.append(x)
        for block in self.out_blocks:
            x = self._run(block, x, condition, skips.pop(), ids_keep)
        x = self._complete(x, condition, ids_keep)
        for block in self.decoder_blocks:
            x = self._run(block, x, condition, patches)

        shift, scale = self.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        x = self.proj_out_2(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        sample = self._unpatchify(x)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _complete(self, kept: Tensor, condition: Tensor, ids_keep: Tensor | None) -> Tensor:
        """All tokens for the decoder, (B, N, C): those the encoder saw, the others from the side interpolater."""
        if ids_keep is None:
            return kept + self.decoder_position_embedding
        tokens = self.mask_token.to(kept.dtype).repeat(len(kept), self.num_tokens, 1)
        tokens = tokens.scatter(1, _over_channels(ids_keep, kept), kept) + self.decoder_position_embedding
        dropped = tokens.new_ones(tokens.shape[:2], dtype=torch.bool).scatter(1, ids_keep, False)
        return torch.where(dropped[..., None], self._run(self.side_block, tokens, condition), tokens)

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """One block, recomputed in the backward pass if gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p·p·C) to (B, C, H, W)."""
        patch, size = self.config["patch_size"], self.config["sample_size"]
        x = x.unflatten(1, (size // patch, -1)).unflatten(-1, (patch, patch, self.out_channels))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, size, size)


def _over_channels(ids: Tensor, like: Tensor) -> Tensor:
    """Token indices (B, K) as an index into (B, N, C)."""
    return ids[..., None].expand(-1, -1, like.shape[-1])
