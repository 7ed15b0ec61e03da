"""What a block attended to: records of q, k, v and the output weight, and the capture that makes them."""

from shd_diffusion.attention.blocks import AttentionBlock, attention_blocks
from shd_diffusion.attention.capture import AttentionCapture
from shd_diffusion.attention.records import AttentionRecord, Kind

__all__ = ["AttentionBlock", "AttentionCapture", "AttentionRecord", "Kind", "attention_blocks"]
