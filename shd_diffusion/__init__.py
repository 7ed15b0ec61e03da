"""Squeezing-Heads Distillation of diffusion models (SHD, arXiv 2502.07436).

The method in four names: `plan_merges` says which heads merge when, `squeeze_heads` merges a teacher's attention
maps into as many as the student has, `AttentionCapture` records what the blocks of a model attend to, and
`SHDLoss` is the divergence that the student is trained with.
"""

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.losses import SHDLoss
from shd_diffusion.squeezing import plan_merges, squeeze_heads

__all__ = ["AttentionCapture", "SHDLoss", "plan_merges", "squeeze_heads"]
