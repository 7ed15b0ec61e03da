"""The Squeezing-Heads Distillation loss (METHOD.md section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.blocks import LayerMap, map_blocks
from shd_diffusion.losses.divergence import DIVERGENCES, Divergence
from shd_diffusion.losses.streaming import Targets, map_divergence, masked
from shd_diffusion.squeezing.plan import plan_merges
from shd_diffusion.squeezing.weights import Squeezer, apply_weights, prepare, squeeze_weights, with_weights


@dataclass
class SHDLoss:
    """Mean over blocks, samples, heads and query rows of τ² · KL(squeezed teacher map || student map)."""

    temperature: float = 1.0
    layer_map: LayerMap = "uniform"
    divergence: Divergence = "forward_kl"

    def __call__(
        self,
        teacher_records: Mapping[str, AttentionRecord],
        student_records: Mapping[str, AttentionRecord],
        *,
        step: int = 0,
        timesteps: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; its gradient reaches the student's queries and keys only."""
        pairs = map_blocks(
            {name: record.kind for name, record in teacher_records.items()},
            {name: record.kind for name, record in student_records.items()},
            self.layer_map,
        )
        with torch.autocast(next(iter(student_records.values())).query.device.type, enabled=False):
            terms = [
                self._block(teacher_records[theirs], student_records[ours]).mean()
                for ours, theirs in pairs.items()
            ]
        return torch.stack(terms).mean() * self.temperature**2

    def _block(self, teacher: AttentionRecord, student: AttentionRecord) -> Tensor:
        plan = plan_merges(teacher.heads, student.heads)
        squeezer = prepare(plan, teacher.output_weight, teacher.heads)
        return map_divergence(
            student.query,
            student.key,
            student.scale / self.temperature,
            student.mask,
            self._targets(teacher, squeezer),
            DIVERGENCES[self.divergence],
        )

    def _targets(self, teacher: AttentionRecord, squeezer: Squeezer) -> Targets:
        def targets(samples: slice) -> Iterator[tuple[slice, Tensor]]:
            query, key, value = (t[samples].float() for t in (teacher.query, teacher.key, teacher.value))
            rows = slice(0, query.shape[2])
            logits = masked(query @ key.mT * teacher.scale, teacher.mask, samples, rows)
            maps = logits.softmax(-1)
            weights, _ = squeeze_weights(lambda: [maps], value, squeezer)
            softened = maps if self.temperature == 1 else (logits / self.temperature).softmax(-1)
            for part, share in with_weights([softened], weights):
                yield rows, apply_weights(part, share, squeezer.groups)

        return targets
