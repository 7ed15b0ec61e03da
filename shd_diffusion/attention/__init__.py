"""What a block attended to: records of q, k, v and the output weight, and the capture that makes them."""

from shd_diffusion.attention.records import AttentionRecord, Kind

__all__ = ["AttentionRecord", "Kind"]
