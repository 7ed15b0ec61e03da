"""Ways to squeeze a block's heads, by the names that results carry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.squeezing import Plan, SqueezeDetails, match_merges, plan_merges, squeeze_heads
from shd_diffusion.squeezing.chunks import whole
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.plan import members
from shd_diffusion.squeezing.weights import Granularity, Merge


@dataclass(frozen=True, slots=True)
class Strategy:
    """The options of `squeeze_heads`; matched pairs are found on calibration samples, not on those measured."""

    coefficient: Coefficient = "closed_form"
    granularity: Granularity = "sample"
    merge: Merge = "progressive"
    pairing: Literal["adjacent", "matched"] = "adjacent"

    def plan(self, record: AttentionRecord, heads: int) -> Plan:
        """The plan of a block, whose record is of calibration samples."""
        if self.pairing == "adjacent":
            return plan_merges(record.heads, heads)
        batch = (whole(record.maps()), _float(record.value))
        options = self.granularity, self.merge, self.coefficient
        return match_merges([batch], _float(record.output_weight), heads, *options)

    def squeeze(self, record: AttentionRecord, heads: int, plan: Plan) -> tuple[Tensor, SqueezeDetails]:
        """The squeezed maps (B, N, Q, K) of a block, and how they came about."""
        return squeeze_heads(
            record.maps(),
            _float(record.value),
            _float(record.output_weight),
            heads,
            pairing=plan,
            granularity=self.granularity,
            merge=self.merge,
            coefficient=self.coefficient,
            return_details=True,
        )

    def with_mean(self) -> Strategy:
        """The same with α = 1/2 in every merge."""
        return replace(self, coefficient="mean", granularity="sample")


STRATEGIES = {
    "closed form": Strategy(),
    "mean": Strategy("mean"),
    "select": Strategy("select"),
    "by row": Strategy(granularity="row"),
    "joint": Strategy(merge="joint"),
    "matched": Strategy(pairing="matched"),
    "matched mean": Strategy("mean", pairing="matched"),
    "matched by row": Strategy(granularity="row", pairing="matched"),
}


def by_teacher_head(squeezed: Tensor, plan: Plan, heads: int) -> Tensor:
    """The squeezed map that each of the teacher's heads is to use, (B, N, Q, K) to (B, M, Q, K)."""
    place = {head: index for index, group in enumerate(members(plan, heads)) for head in group}
    return squeezed[:, [place[head] for head in range(heads)]]


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
