"""Ways to squeeze a block's heads, by the names that results carry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.squeezing import Plan, SqueezeDetails, match_merges, plan_merges, squeeze_heads
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.map_stream import whole
from shd_diffusion.squeezing.merge_weights import Granularity
from shd_diffusion.squeezing.plan import Merge, members


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
        maps, values, weight = _parts(record)
        return match_merges([(whole(maps), values)], weight, heads, **self._options())

    def squeeze(self, record: AttentionRecord, heads: int, plan: Plan) -> Tensor:
        """The squeezed maps (B, N, Q, K) of a block."""
        return squeeze_heads(*_parts(record), heads, pairing=plan, **self._options())

    def explain(self, record: AttentionRecord, heads: int, plan: Plan) -> tuple[Tensor, SqueezeDetails]:
        """The same, and how they came about."""
        return squeeze_heads(*_parts(record), heads, pairing=plan, **self._options(), return_details=True)

    def _options(self) -> dict[str, Any]:
        return {"granularity": self.granularity, "merge": self.merge, "coefficient": self.coefficient}

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


def _parts(record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, values and output weight, in the precision of the maps."""
    maps = record.maps()
    return maps, record.value.to(maps.dtype), record.output_weight.to(maps.dtype)
