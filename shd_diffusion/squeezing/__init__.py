"""The method: which heads merge when, with which weights, and M maps squeezed into N."""

from shd_diffusion.squeezing.plan import Plan, plan_merges
from shd_diffusion.squeezing.squeeze import SqueezeDetails, squeeze_heads

__all__ = ["Plan", "SqueezeDetails", "plan_merges", "squeeze_heads"]
