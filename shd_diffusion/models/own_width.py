"""The width that some classes have beside their heads: one key of the config, which must follow from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN_WIDTHS = {
    "PixArtTransformer2DModel": ("cross_attention_dim", "num_attention_heads", "attention_head_dim"),
    "SD3Transformer2DModel": ("caption_projection_dim", "num_attention_heads", "attention_head_dim"),
    "AuraFlowTransformer2DModel": ("caption_projection_dim", "num_attention_heads", "attention_head_dim"),
    "HunyuanDiT2DModel": ("hidden_size", "num_attention_heads", "attention_head_dim"),
    "Lumina2Transformer2DModel": ("hidden_size", "num_attention_heads", "axes_dim_rope"),
    "ZImageTransformer2DModel": ("dim", "n_heads", "axes_dims"),
}
"""By class the key of its width, and those of its heads and of the width of a head, or of parts that add up to it."""


def width_to_set(class_name: str, config: Mapping[str, Any]) -> str:
    """What to set, for the end of a message, where a class's own width does not fit its heads; else nothing."""
    key, heads, head_dim = keys = OWN_WIDTHS.get(class_name, ("", "", ""))
    if any(config.get(each) is None for each in keys):
        return ""
    parts = config[head_dim]
    wanted = config[heads] * (parts if isinstance(parts, int) else sum(parts))
    of_heads = f"`{head_dim}`" if isinstance(parts, int) else f"the sum of `{head_dim}`"
    return "" if config[key] == wanted else f"; set `{key}` to `{heads}` times {of_heads}, {wanted}"
