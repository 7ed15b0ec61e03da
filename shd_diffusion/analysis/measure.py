"""Measure how a teacher squeezes: α, what each block loses, and what the denoiser's output loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.analysis.pairs import PairDifferences, compare_pairs, total_variation
from shd_diffusion.analysis.spread import spread
from shd_diffusion.analysis.squeezed_model import squeezed_attention
from shd_diffusion.analysis.strategies import STRATEGIES, Strategy, by_teacher_head
from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.data import Source
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import predict_frozen
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.progress import progress_bar
from shd_diffusion.squeezing import Plan
from shd_diffusion.squeezing.plan import members
from shd_diffusion.statistics import estimate
from shd_diffusion.training.diagnostics import probe_batches

Records = Mapping[str, AttentionRecord]


@dataclass(frozen=True, slots=True)
class MeasurementPlan:
    """Every one of `samples` images, with its noise, is seen at each of `timesteps` evenly spaced timesteps.

    Plans of matched pairs are found on `calibration` other images, each at a timestep of its own.
    """

    samples: int = 24
    timesteps: int = 8
    calibration: int = 32
    seed: int = 0


@dataclass
class Case:
    """A strategy that squeezes a teacher to so many heads, and what is gathered of it, timestep by timestep.

    Attributes:
        plans: of each block.
        coefficients, residual, block_error, from_mean: by block, see `_measure_block`.
        output_error: per sample |ε' - ε|² / |ε|², ε' being what the squeezed teacher predicts.
        denoising: per sample the mean squared error of ε'.
    """

    heads: int
    name: str
    strategy: Strategy
    plans: dict[str, Plan]
    coefficients: dict[str, list[Tensor]] = field(default_factory=dict)
    residual: dict[str, list[Tensor]] = field(default_factory=dict)
    block_error: dict[str, list[Tensor]] = field(default_factory=dict)
    from_mean: dict[str, list[Tensor]] = field(default_factory=dict)
    output_error: list[Tensor] = field(default_factory=list)
    denoising: list[Tensor] = field(default_factory=list)

    def maps(self, record: AttentionRecord) -> Tensor:
        """The squeezed map for each of a block's teacher heads, (B, M, Q, K)."""
        plan = self.plans[record.name]
        squeezed = self.strategy.squeeze(record, _target(record, self.heads), plan)
        return by_teacher_head(squeezed, plan, record.heads)


@torch.no_grad()
def measure(
    model: ModelMixin, source: Source, process: ForwardProcess, heads: Sequence[int], plan: MeasurementPlan
) -> dict[str, Any]:
    """How a frozen teacher squeezes to each number of heads, by each of `STRATEGIES`.

    A block that has no more heads than asked for keeps its own.

    Returns:
        JSON: `blocks` (the pairs that merge first, and how far all heads are apart), `squeezings` (a case each,
        with its blocks), the teacher's own `denoising` error, and for scale `uniform_output_error`, where all
        heads of all blocks look everywhere alike.
    """
    first, *batches = _batches(model, source, process, plan)
    with AttentionCapture(model) as capture:
        predict_frozen(model, first.noised, first.timesteps, first.condition)
        calibration = capture.records
    cases = [
        Case(count, name, way, {b: way.plan(r, _target(r, count)) for b, r in calibration.items()})
        for count in heads
        for name, way in STRATEGIES.items()
    ]
    pairs: dict[str, list[tuple[PairDifferences, Tensor]]] = {}
    own, uniform = [], []
    bar = progress_bar(len(batches) * len(cases), "squeeze", "pass")
    for batch in batches:
        target = process.target(batch.clean, batch.noise, batch.timesteps)
        with AttentionCapture(model) as capture:
            predicted = _prediction(model, batch)
            records = capture.records
        own.append(_per_sample(predicted - target))
        for name, record in records.items():
            merging = compare_pairs(record, _first_pairs(record.heads))
            pairs.setdefault(name, []).append((merging, total_variation(record.maps())))
        with squeezed_attention(model, _uniform):
            uniform.append(_per_sample(_prediction(model, batch) - predicted) / _per_sample(predicted))
        for case in cases:
            for name, record in records.items():
                _measure_block(case, name, record)
            with squeezed_attention(model, case.maps):
                squeezed = _prediction(model, batch)
            case.output_error.append(_per_sample(squeezed - predicted) / _per_sample(predicted))
            case.denoising.append(_per_sample(squeezed - target))
            bar.update()
    bar.close()
    mean = {case.heads: case for case in cases if case.name == "mean"}
    return {
        "denoising": torch.stack(own).mean().item(),
        "uniform_output_error": torch.stack(uniform).mean().item(),
        "timesteps": [int(batch.timesteps[0]) for batch in batches],
        "blocks": {name: _describe_pairs(records[name].heads, of) for name, of in pairs.items()},
        "squeezings": [_describe(case, mean[case.heads]) for case in cases],
    }


def _batches(
    model: ModelMixin, source: Source, process: ForwardProcess, plan: MeasurementPlan
) -> Iterator[Batch]:
    """The calibration batch, and then the same samples at each timestep."""
    total = plan.calibration + plan.samples
    (drawn,) = probe_batches(source, process, {}, model.device, 1, total, plan.seed)
    yield _take(drawn, slice(plan.calibration))
    samples = _take(drawn, slice(plan.calibration, None))
    for step in range(plan.timesteps):
        shares = torch.full((len(samples.clean),), (2 * step + 1) / (2 * plan.timesteps), dtype=torch.float64)
        timesteps = process.timesteps(shares).to(model.device)
        noised = process.noised(samples.clean, samples.noise, timesteps)
        yield replace(samples, noised=noised, timesteps=timesteps)


def _take(batch: Batch, part: slice) -> Batch:
    condition = {name: value[part] for name, value in batch.condition.items()}
    return Batch(batch.clean[part], batch.noise[part], batch.noised[part], batch.timesteps[part], condition)


def _prediction(model: ModelMixin, batch: Batch) -> Tensor:
    """Without the channels of a learned variance."""
    prediction = predict_frozen(model, batch.noised, batch.timesteps, batch.condition)
    return prediction[:, : batch.clean.shape[1]].float()


def _per_sample(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def _uniform(record: AttentionRecord) -> Tensor:
    maps = record.maps()
    return torch.full_like(maps, 1 / maps.shape[-1])


def _target(record: AttentionRecord, heads: int) -> int:
    return min(heads, record.heads)


def _first_pairs(heads: int) -> list[tuple[int, int]]:
    return [(head, head + 1) for head in range(0, heads - 1, 2)]


def _measure_block(case: Case, name: str, record: AttentionRecord) -> None:
    """Squeeze one block at the inputs that the unchanged teacher gives it.

    Gathers α (B, merges), by row (B, merges, Q); the relative residual of the heads that merged, (B,); the block's
    |O' - O| / |O| over all heads, (B,); and KL(Ā || Ā with α = 1/2), mean over heads and rows, (B,).
    """
    target, plan, strategy = _target(record, case.heads), case.plans[name], case.strategy
    squeezed, details = strategy.explain(record, target, plan)
    with_mean = strategy.with_mean().squeeze(record, target, plan)
    merged = [i for i, group in enumerate(members(plan, record.heads)) if len(group) > 1]
    output = _block_output(record, record.maps())
    error = _block_output(record, by_teacher_head(squeezed, plan, record.heads)) - output
    tiny = torch.finfo(squeezed.dtype).tiny
    divergence = (squeezed * (squeezed.clamp_min(tiny) / with_mean.clamp_min(tiny)).log()).sum(-1)
    found = {
        "coefficients": details.coefficients,
        "residual": details.residual[:, merged].mean(1) if merged else details.residual.new_zeros(len(error)),
        "block_error": (_per_sample(error) / _per_sample(output)).sqrt(),
        "from_mean": divergence.mean((1, 2)),
    }
    for part, value in found.items():
        getattr(case, part).setdefault(name, []).append(value)


def _block_output(record: AttentionRecord, maps: Tensor) -> Tensor:
    """O = sum_h A_h X_h, (B, Q, C)."""
    attended = maps @ record.value.to(maps.dtype)
    return attended.transpose(1, 2).flatten(2) @ record.output_weight.T.to(maps.dtype)


# --- as JSON -------------------------------------------------------------------------------------------------


def _describe_pairs(heads: int, found: Sequence[tuple[PairDifferences, Tensor]]) -> dict[str, Any]:
    """Means over samples and timesteps.

    `strength` is a geometric mean, and so is `imbalance`, the stronger head's over the weaker's in each sample.
    """
    if heads == 1:
        return {"heads": 1, "total_variation": None, "pairs": []}
    strength = torch.cat([each.strength for each, _ in found]).log()  # (T·B, pairs)
    means = {
        "total_variation": _means(each.total_variation for each, _ in found),
        "cosine": _means(each.cosine for each, _ in found),
        "strength": strength.mean(0).exp().tolist(),
        "imbalance": strength.abs().mean(0).exp().tolist(),
        "saved": _means(each.saved for each, _ in found),
    }
    merging = [
        {"heads": list(pair), **{name: values[index] for name, values in means.items()}}
        for index, pair in enumerate(_first_pairs(heads))
    ]
    distance = torch.cat([all_pairs for _, all_pairs in found]).mean(0)
    others = distance[~torch.eye(heads, dtype=torch.bool, device=distance.device)].view(heads, -1)
    return {
        "heads": heads,
        "total_variation": {"mean": others.mean().item(), "nearest": others.amin(1).mean().item()},
        "pairs": merging,
    }


def _describe(case: Case, mean: Case) -> dict[str, Any]:
    """Errors as means over samples and timesteps, those of the output with the samples' 95 % interval."""
    output, of_mean = (torch.stack(each.output_error).mean(0).cpu().double() for each in (case, mean))
    return {
        "heads": case.heads,
        "strategy": case.name,
        "output_error": asdict(estimate(output.tolist())),
        "output_error_minus_mean": asdict(estimate((output - of_mean).tolist())),
        "output_error_by_timestep": [each.mean().item() for each in case.output_error],
        "denoising": _mean(case.denoising),
        "blocks": {name: _describe_block(case, name) for name in case.plans},
    }


def _describe_block(case: Case, name: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "plan": case.plans[name],
        **{part: _mean(getattr(case, part)[name]) for part in ("residual", "block_error", "from_mean")},
    }
    if case.name in ("closed form", "by row"):  # α as the paper has it, and its refinement
        table = torch.stack(case.coefficients[name])  # (T, B, merges), by row (T, B, merges, Q)
        described["coefficients"] = [asdict(spread(merge)) for merge in table.unbind(2)]
    return described


def _mean(parts: Sequence[Tensor]) -> float:
    return torch.stack([*parts]).cpu().double().mean().item()


def _means(parts: Iterator[Tensor]) -> list[float]:
    """Of each column of (B, P) tensors."""
    return torch.cat([*parts]).cpu().double().mean(0).tolist()
