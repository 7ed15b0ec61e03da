"""What a step minimises: every term of the loss on the outputs of teacher and student."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.attention.outputs import OutputCapture
from shd_diffusion.losses.denoise import Denoise, squared_error
from shd_diffusion.losses.padding import with_text_mask
from shd_diffusion.losses.shd import SHD
from shd_diffusion.losses.term import Batch, Captured, NonFiniteError, StepOutputs, Term
from shd_diffusion.models.denoiser import drop_condition, predict, predict_frozen
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.progress import announce
from shd_diffusion.training.mixing import pick

MASKED_SUFFIX = "_masked"
TEACHER = "teacher"
"""Among the terms, the regression of a teacher that trains too."""


class TrainingLoss:
    """The terms of a loss on a batch, by name: L = Σ w · L_term (docs/method.md section 6).

    A context: while it is open, what the terms look at is captured in every pass of teacher and student, and nothing
    else. Both see the same noised samples, timesteps, conditions, dropped conditions and tokens. A term of weight 0
    is not computed; without a term that needs it, neither is the teacher's forward pass. Where passes are masked, each
    term is there twice, of the whole batch and of the masked one, as `<term>_masked`; both count alike (sail-sg/MDT
    sums them).

    Args:
        process: by which batches are noised.
        terms: by name, on the device.
        student: in training.
        teacher: frozen, in evaluation mode; None where nobody teaches.
        max_steps: where a decaying weight ends.
        teacher_rate: the learning rate of a teacher that trains too. In the passes that it teaches in, its own
            regression ‖y − target‖² counts as `teacher` among the terms. Neither model's loss reaches the other.
    """

    def __init__(
        self,
        process: ForwardProcess,
        terms: Mapping[str, Term],
        student: ModelMixin,
        teacher: ModelMixin | None,
        max_steps: int,
        teacher_rate: float | None = None,
    ) -> None:
        self.process, self.teacher, self.max_steps = process, teacher, max_steps
        self.teacher_rate = teacher_rate
        self.terms = nn.ModuleDict(terms)
        self._student = _Capture(student, terms, 0)
        self._teacher = None if teacher is None else _Capture(teacher, terms, 1)
        self._stack = ExitStack()
        self._by_block: tuple[int, list[Tensor]] = (
            -1,
            [],
        )  # a step, and SHD's terms in its passes, times their samples

    def __enter__(self) -> TrainingLoss:
        for capture in (self._student, self._teacher):
            if capture is not None:
                self._stack.enter_context(capture)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """The unweighted terms of a batch.

        Args:
            model: the student, possibly wrapped for distributed training.
            batch: what both models see.
            step: counted from 0.
        """
        terms = self._pass(model, batch, step)
        self._keep_by_block(step, len(batch.clean))
        if batch.mask:
            masked = replace(batch, condition={**batch.condition, **batch.mask}, mask={})
            terms |= {name + MASKED_SUFFIX: term for name, term in self._pass(model, masked, step).items()}
        return terms

    @cached_property
    def stages(self) -> dict[int, int]:
        """Of each set of terms that count together, the first step at which they do, and at how many."""
        first: dict[tuple[str, ...], int] = {}
        stages: Counter[int] = Counter()
        for step in range(max(self.max_steps, 1)):
            active = tuple(name for name, term in self._all() if term.weight(step, self.max_steps))
            stages[first.setdefault(active, step)] += 1
        return dict(stages)

    @cached_property
    def fullest_step(self) -> int:
        """The first step at which most terms count."""
        return max(self.stages, key=lambda step: (sum(map(bool, self.weights(step).values())), -step))

    def plain(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The unweighted terms of the fullest step on a batch, all tokens seen; nothing is kept of them."""
        return self._pass(model, batch, self.fullest_step)

    def of_teacher(self, batch: Batch) -> dict[str, Tensor]:
        """The unweighted regression of the fullest step, of the teacher's prediction in place of the student's.

        Empty where nobody teaches or nothing is regressed.
        """
        weights = self.weights(self.fullest_step)
        active = {n: t for n, t in self._all() if isinstance(t, Denoise) and weights[n]}
        if self.teacher is None or not active:
            return {}
        prediction = predict_frozen(self.teacher, batch.noised, batch.timesteps, batch.condition)
        outputs = StepOutputs(self.process, batch, prediction)
        return {name: term(outputs) for name, term in active.items()}

    def weights(self, step: int) -> dict[str, float]:
        """The weight of every term at a step."""
        weights = {name: term.weight(step, self.max_steps) for name, term in self._all()}
        weights |= {} if self.teacher_rate is None else {TEACHER: 1.0}
        return weights | {name + MASKED_SUFFIX: weight for name, weight in weights.items()}

    def shd_by_block(self, step: int) -> dict[str, Tensor]:
        """By student block the SHD term of the step just taken, summed over its samples; empty if it has none."""
        kept_of, terms = self._by_block
        shd = self.shd
        if shd is None or shd.loss.last is None or kept_of != step:
            return {}
        return dict(zip(shd.loss.last[0], torch.stack(terms).sum(0), strict=True))

    @property
    def shd(self) -> SHD | None:
        """The SHD term, if it is one of the loss."""
        return next((term for _, term in self._all() if isinstance(term, SHD)), None)

    def parameters(self) -> list[nn.Parameter]:
        """What trains beside the student and is no part of it."""
        return list(self.terms.parameters())

    def parameters_at(self, step: int) -> list[nn.Parameter]:
        """What of it trains at a step, beside the student: the optimiser leaves alone what has no gradient then."""
        active = [term for _, term in self._all() if term.weight(step, self.max_steps)]
        own = [parameter for term in active for parameter in term.parameters()]
        return own + (self.teacher_parameters() if any(term.needs_teacher for term in active) else [])

    def teacher_parameters(self) -> list[nn.Parameter]:
        """Those of a teacher that trains too; none where it does not."""
        return [] if self.teacher is None or self.teacher_rate is None else list(self.teacher.parameters())

    @property
    def kept(self) -> nn.Module:
        """What a checkpoint keeps beside the student: the terms, and a teacher that trains too."""
        if self.teacher is None or self.teacher_rate is None:
            return self.terms
        return nn.ModuleDict({**self.terms, TEACHER: self.teacher})

    def _all(self) -> Iterator[tuple[str, Term]]:
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            yield name, term

    def _pass(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        active = {name: term for name, term in self._all() if term.weight(step, self.max_steps)}
        if not batch.mixed:
            return self._terms(active, model, batch, step)
        taught = {name: term for name, term in active.items() if term.needs_teacher}
        alone = {name: term for name, term in active.items() if name not in taught}
        terms = self._terms(alone, model, replace(batch, mixed=()), step) if alone else {}
        if taught:
            assert self.teacher is not None
            mixed = batch.mixed[0] if len(batch.mixed) == 1 else pick(batch.mixed, model, self.teacher)
            terms |= self._terms(taught, model, mixed, step)
        return terms

    def _terms(
        self, active: Mapping[str, Term], model: nn.Module, batch: Batch, step: int
    ) -> dict[str, Tensor]:
        """These terms, of one pass of student and teacher."""
        seen = batch.noised, batch.timesteps, batch.condition
        teacher_prediction, null_prediction, teacher = None, None, Captured()
        terms: dict[str, Tensor] = {}
        if self.teacher is not None and any(term.needs_teacher for term in active.values()):
            if any(
                term.needs_null_prediction for term in active.values()
            ):  # first: the last pass is captured
                everywhere = torch.ones(len(batch.clean), dtype=torch.bool)
                null = drop_condition(batch.condition, batch.null, everywhere)
                null_prediction = predict_frozen(self.teacher, batch.noised, batch.timesteps, null)
            trains = self.teacher_rate is not None and torch.is_grad_enabled()
            teacher_prediction = (predict if trains else predict_frozen)(self.teacher, *seen)
            assert self._teacher is not None
            teacher = self._teacher.read(batch).to(batch.noised.device)
            if trains:
                terms[TEACHER] = self._regression(teacher_prediction, batch)
                teacher_prediction, teacher = teacher_prediction.detach(), teacher.detached()
        prediction = predict(model, *seen)
        student = self._student.read(batch)
        outputs = StepOutputs(
            self.process, batch, prediction, teacher_prediction, student, teacher, step, null_prediction
        )
        with torch.autocast(prediction.device.type, enabled=False):
            for name, term in active.items():
                with _nan_where_not_finite(terms, name, prediction, step):
                    terms[name] = term(outputs)
            if not any(term.reaches_output for term in active.values()):
                # Distributed training waits for a gradient of every parameter, those behind the last map too.
                first = next(iter(active))
                nothing = prediction.flatten()[:0].sum()  # 0, whatever half precision sums up to
                terms[first] = terms[first] + nothing
        return terms

    def _regression(self, prediction: Tensor, batch: Batch) -> Tensor:
        target = self.process.target(batch.clean, batch.noise, batch.timesteps)
        return squared_error(prediction[:, : batch.clean.shape[1]], target)

    def _keep_by_block(self, step: int, samples: int) -> None:
        """Keep SHD's terms by block where all tokens were seen; nothing is computed before a step is logged."""
        if self.shd is None or self.shd.loss.last is None or not self.shd.weight(step, self.max_steps):
            return
        if self._by_block[0] != step:
            self._by_block = step, []
        self._by_block[1].append(self.shd.loss.last[1] * samples)


class _Capture:
    """Context that captures of one model what the terms look at, and no more.

    Args:
        model: student or teacher.
        terms: all of the loss.
        side: of `looks_at`, 0 for the student, 1 for the teacher.
    """

    def __init__(self, model: ModelMixin, terms: Mapping[str, Term], side: int) -> None:
        wanted: dict[str, dict[str, None]] = {"records": {}, "outputs": {}}
        for term in terms.values():
            records = term.looks_at[side] if term.captures == "records" else ()
            if term.captures == "outputs":
                wanted["outputs"] |= dict.fromkeys(term.looks_at[side])
                records = term.rows.values() if side == 0 else ()
            # a block that joins image and text leaves a second record, `<block>:context`
            wanted["records"] |= {name.partition(":")[0]: None for name in records}
        self._records = AttentionCapture(model, wanted["records"]) if wanted["records"] else None
        self._outputs = OutputCapture(model, wanted["outputs"])
        self._stack = ExitStack()

    def __enter__(self) -> _Capture:
        contexts: list[AbstractContextManager[object]] = [self._outputs]
        for context in [*contexts, *([self._records] if self._records else [])]:
            self._stack.enter_context(context)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._records is not None:
            self._records.forget()

    def read(self, batch: Batch) -> Captured:
        """Of the last pass, which was on this batch."""
        records = with_text_mask(self._records.records, batch.condition) if self._records else {}
        return Captured(records, self._outputs.outputs)


@contextmanager
def _nan_where_not_finite(
    terms: dict[str, Tensor], name: str, prediction: Tensor, step: int
) -> Iterator[None]:
    """A term that cannot be computed is NaN, with a gradient: all processes must go on to the backward pass,
    after which the step is left out."""
    try:
        yield
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        announce(f"step {step + 1}: {name}: {error}")
        terms[name] = prediction.sum() * math.nan
