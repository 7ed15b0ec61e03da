"""What the SHD loss compares, laid open for a report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import DivergenceFunction
from shd_diffusion.losses.map_divergence import Pool, SqueezedTeacher, log_maps, map_stream, pooled
from shd_diffusion.losses.padding import mean_of_rows
from shd_diffusion.squeezing.map_stream import EVERYTHING, kept
from shd_diffusion.squeezing.merge_weights import mixture
from shd_diffusion.squeezing.residual import relative_residual, residual_energies


@dataclass(frozen=True, slots=True)
class Inspection:
    """One student block: S samples, M teacher heads, N student heads, maps (Q, K) at the loss's temperature.

    Attributes:
        teacher: (S, M, Q, K).
        squeezed: (S, N, Q, K), in the order of the student's heads.
        student: (S, N, Q, K).
        coefficients: (S, M - N), by row (S, M - N, Q): see `SqueezeDetails`.
        weights: (S, N, M), by row (S, N, M, Q).
        residual: (S, N), see `SqueezeDetails`.
        divergence: (S, N), mean over the query rows that count.
    """

    teacher: Tensor
    squeezed: Tensor
    student: Tensor
    coefficients: Tensor
    weights: Tensor
    residual: Tensor
    divergence: Tensor


def inspect_block(
    teacher: SqueezedTeacher, student: AttentionRecord, divergence: DivergenceFunction, pool: Pool
) -> Inspection:
    """Compute all maps of one block at once, of as many samples as the records hold."""
    record = teacher.record
    maps = kept(map_stream(record))
    weights, coefficients = teacher.weights(maps)
    value = record.value.to(weights.dtype)
    weight = record.output_weight.to(value.device)
    energies = residual_energies(maps, value, weight, weights, teacher.squeezer.groups)
    softened = record.comparable_logits(teacher.temperature).softmax(-1)
    squeezed = pooled(mixture(weights, teacher.squeezer.groups)(EVERYTHING, softened), teacher.pool)
    log_student = log_maps(student, EVERYTHING, teacher.temperature, pool)
    if teacher.granularity == "sample":
        coefficients, weights = coefficients[..., 0], weights[..., 0]
    return Inspection(
        teacher=pooled(softened, teacher.pool),
        squeezed=squeezed,
        student=log_student.exp(),
        coefficients=coefficients,
        weights=weights,
        residual=relative_residual(energies),
        divergence=mean_of_rows(
            divergence(squeezed, log_student)[0], student.counted if pool == (1, 1) else None
        ),
    )
