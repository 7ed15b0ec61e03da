"""Which modules of a model attend, and what is known of them without a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from shd_diffusion.attention.records import Kind


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """One attention module of a model, as it stands.

    Attributes:
        name: module path inside the model, e.g. `transformer_blocks.3.attn1`.
        kind: `self`, `cross`, or `joint`.
        heads: number of query heads H, hence of maps.
        key_value_heads: number of key and value heads; fewer than H where queries share them in groups.
        head_dim: width d of a head.
        reason: why it cannot be captured; None where it can.
    """

    name: str
    kind: Kind
    heads: int
    key_value_heads: int
    head_dim: int
    reason: str | None = None

    @property
    def capturable(self) -> bool:
        return self.reason is None


def attention_blocks(model: nn.Module) -> dict[str, AttentionBlock]:
    """The attention blocks of a model in the order in which they run, by module path. Runs nothing."""
    modules = attention_modules(model)
    return {name: describe(name, module) for name, module in modules.items()}


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of diffusers' attention interface (`set_processor`), in the order in which they run."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}
    return dict(sorted(found.items(), key=lambda item: _unet_stage(item[0])))


def describe(name: str, module: nn.Module) -> AttentionBlock:
    """What can be said of one attention module without running it."""
    heads: int = module.heads  # type: ignore[assignment]
    head_dim = module.to_q.out_features // heads  # type: ignore[union-attr, operator, operator]
    kind: Kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
    return AttentionBlock(name, kind, heads, heads, head_dim)


def output_weight(module: nn.Module) -> Tensor:
    """The output projection's weight (C, H·d)."""
    return module.to_out[0].weight  # type: ignore[index, union-attr, return-value]


def _unet_stage(name: str) -> int:
    """A UNet runs down, mid, up, but registers its middle last; everything else runs as registered."""
    stages = ("down_block", "mid_block", "up_block")
    return next((i for i, stage in enumerate(stages) if name.startswith(stage)), 0)
