"""The method: which heads merge when, what each counts in a merge, and M maps squeezed into N."""

from shd_diffusion.squeezing.matching import match_merges
from shd_diffusion.squeezing.merge_weights import Squeezer, prepare_squeezer
from shd_diffusion.squeezing.plan import Plan, plan_merges, plans_from_json, plans_to_json
from shd_diffusion.squeezing.squeeze import SqueezeDetails, squeeze_heads

__all__ = [
    "Plan",
    "SqueezeDetails",
    "Squeezer",
    "match_merges",
    "plan_merges",
    "plans_from_json",
    "plans_to_json",
    "prepare_squeezer",
    "squeeze_heads",
]
