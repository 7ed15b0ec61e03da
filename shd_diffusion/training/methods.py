"""What a step minimises: the terms of the loss, each a scalar by name, and their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.attention.outputs import OutputCapture
from shd_diffusion.config import DiffusionConfig, LossesConfig
from shd_diffusion.losses import NonFiniteError, SHDLoss, schedule_weight
from shd_diffusion.losses.baselines import Baseline, Captured
from shd_diffusion.losses.baselines.captured import running_blocks
from shd_diffusion.losses.denoising import ForwardProcess, squared_error
from shd_diffusion.losses.variance import variational_bound
from shd_diffusion.models.adapter import predict
from shd_diffusion.progress import announce
from shd_diffusion.training.draws import Draws


@dataclass(frozen=True)
class Batch:
    """A noised batch: clean, noise and noised (B, C, H, W), timesteps, times and labels (B,).

    Timesteps count the forward process; times are what the denoiser is told of them. Where the pass is masked,
    `ids_keep` (B, K) are the tokens that teacher and student see.
    """

    clean: Tensor
    noise: Tensor
    noised: Tensor
    timesteps: Tensor
    times: Tensor
    labels: Tensor
    ids_keep: Tensor | None = None


def make_batch(process: ForwardProcess, clean: Tensor, labels: Tensor, draws: Draws, null: int) -> Batch:
    """Noise the images at their timesteps and drop the labels that are to be dropped."""
    return Batch(
        clean=clean,
        noise=draws.noise,
        noised=process.noised(clean, draws.noise, draws.timesteps),
        timesteps=draws.timesteps,
        times=process.times(draws.timesteps),
        labels=labels.masked_fill(draws.dropped, null),
        ids_keep=draws.ids_keep,
    )


class DenoisingLoss:
    """L_simple, weighed by timestep if asked for, and L_vlb where the variance is learned."""

    def __init__(self, process: ForwardProcess, config: DiffusionConfig) -> None:
        self.process, self.config = process, config

    def __call__(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms `denoise` and, with a learned variance, `variance`."""
        gamma, channels = self.config.min_snr_gamma, batch.clean.shape[1]
        weights = None if gamma is None else self.process.min_snr_weight(batch.timesteps, gamma)
        target = self.process.target(batch.clean, batch.noise, batch.timesteps)
        terms = {"denoise": squared_error(prediction[:, :channels], target, weights)}
        if self.config.learned_variance:
            terms["variance"] = variational_bound(
                self.process, prediction, batch.clean, batch.noised, batch.timesteps
            )
        return terms


class Method(Protocol):
    """A way to train a denoiser."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """The unweighted terms of a batch."""

    def weights(self, step: int) -> dict[str, float]:
        """The weight of every term at a step."""

    def divergences(self, step: int) -> dict[str, Tensor]:
        """By student block the SHD term of the step just taken, mean over its batches; empty if it has none."""

    def parameters(self) -> list[nn.Parameter]:
        """What trains beside the model and is no part of it."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Denoising:
    """The denoising loss alone: how a teacher is trained."""

    def __init__(self, denoising: DenoisingLoss) -> None:
        self.denoising = denoising

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.denoising(predict(model, batch.noised, batch.times, batch.labels, batch.ids_keep), batch)

    def weights(self, step: int) -> dict[str, float]:
        return {"denoise": 1.0, "variance": 1.0}

    def divergences(self, step: int) -> dict[str, Tensor]:
        return {}

    def parameters(self) -> list[nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


@torch.no_grad()
def predict_frozen(model: ModelMixin, batch: Batch) -> Tensor:
    """What a model predicts that may stand on another device, and compute in another precision, than the batch."""
    there, keep = model.device, batch.ids_keep
    noised, times, labels = batch.noised.to(there, model.dtype), batch.times.to(there), batch.labels.to(there)
    prediction = predict(model, noised, times, labels, None if keep is None else keep.to(there))
    return prediction.to(batch.noised.device)


class Captures:
    """Context that notes, in every pass of teacher and student, what SHD and the baselines look at.

    Blocks that run in masked passes only (MDTv2's side block) are left out: a student samples without them.

    Args:
        teacher: frozen.
        student: in training.
        shd: whether SHD is a term of the loss.
        baselines: those in use.
    """

    def __init__(
        self, teacher: ModelMixin, student: ModelMixin, shd: bool, baselines: Mapping[str, Baseline]
    ) -> None:
        looking_at_maps = shd or any(baseline.needs_records for baseline in baselines.values())
        models = (teacher, student) if looking_at_maps else ()
        self._records = [AttentionCapture(model, running_blocks(model)) for model in models]
        pairs = [pair for b in baselines.values() if not b.needs_records for pair in b.pairs.items()]
        ours, theirs = ({pair[side]: None for pair in pairs} for side in (0, 1))
        self._outputs = OutputCapture(teacher, theirs), OutputCapture(student, ours)
        self._stack, self._device = ExitStack(), student.device

    def __enter__(self) -> Captures:
        contexts: list[AbstractContextManager[object]] = [*self._records, *self._outputs]
        for context in contexts:
            self._stack.enter_context(context)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self) -> tuple[Captured, Captured]:
        """Of the teacher's and of the student's last pass."""
        records = [capture.records for capture in self._records] or [{}, {}]
        teacher, student = (Captured(r, o.outputs) for r, o in zip(records, self._outputs, strict=True))
        return teacher.to(self._device), student


class Distillation:
    """L = w_denoise · L_denoise + w_output · ||ε_student - ε_teacher||² + w_shd · L_SHD (docs/method.md section 6),
    and the baselines that SHD is compared with.

    Teacher and student see the same noised images, timesteps, labels, dropped labels and tokens. A term of weight 0
    is not computed; without a term that needs it, neither is the teacher's forward pass.

    Args:
        denoising: the denoising loss.
        teacher: frozen, in evaluation mode.
        captures: of teacher and student, open.
        shd: the SHD loss; None where it is left out.
        baselines: by their sections in `losses`, on the device.
        losses: the weights.
        max_steps: where a decaying weight ends.
    """

    def __init__(
        self,
        denoising: DenoisingLoss,
        teacher: ModelMixin,
        captures: Captures,
        shd: SHDLoss | None,
        baselines: Mapping[str, Baseline],
        losses: LossesConfig,
        max_steps: int,
    ) -> None:
        self.denoising, self.teacher, self.captures, self.shd = denoising, teacher, captures, shd
        self.baselines, self.losses, self.max_steps = nn.ModuleDict(baselines), losses, max_steps
        self._by_block: tuple[int, list[Tensor]] = -1, []  # a step, and SHD's terms in each of its batches

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        if weights["output"] or weights["shd"] or self.baselines:
            taught = predict_frozen(self.teacher, batch)
        prediction = predict(model, batch.noised, batch.times, batch.labels, batch.ids_keep)
        terms = {name: term for name, term in self.denoising(prediction, batch).items() if weights[name]}
        if weights["output"]:
            channels = min(prediction.shape[1], taught.shape[1])
            terms["output"] = squared_error(prediction[:, :channels], taught[:, :channels])
        of_teacher, of_student = self.captures.read()
        if weights["shd"] and self.shd is not None:
            with _nan_where_not_finite(terms, "shd", prediction, step):
                terms["shd"] = self.shd(
                    of_teacher.records, of_student.records, step=step, timesteps=batch.timesteps
                )
                self._keep(step, batch)
        with torch.autocast(prediction.device.type, enabled=False):
            for name, baseline in self.baselines.items():
                with _nan_where_not_finite(terms, name, prediction, step):
                    terms[name] = baseline(of_teacher, of_student)
        return terms

    def weights(self, step: int) -> dict[str, float]:
        shd = self.losses.shd
        return {
            "denoise": self.losses.denoise.weight,
            "variance": self.losses.variance.weight,
            "output": self.losses.output.weight,
            "shd": schedule_weight(shd.weight, step, self.max_steps, shd.decay, shd.every),
            **{name: getattr(self.losses, name).weight for name in self.baselines},
        }

    def divergences(self, step: int) -> dict[str, Tensor]:
        kept_of, terms = self._by_block
        if self.shd is None or self.shd.last is None or kept_of != step:
            return {}
        return dict(zip(self.shd.last[0], torch.stack(terms).mean(0), strict=True))

    def _keep(self, step: int, batch: Batch) -> None:
        """Keep SHD's terms by block where all tokens were seen; nothing is computed before a step is logged."""
        if batch.ids_keep is None and self.shd is not None and self.shd.last is not None:
            if self._by_block[0] != step:
                self._by_block = step, []
            self._by_block[1].append(self.shd.last[1])

    def parameters(self) -> list[nn.Parameter]:
        return list(self.baselines.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        of_shd = self.shd.state_dict() if self.shd is not None else {}
        return {**_prefixed("shd", of_shd), **_prefixed("baselines", self.baselines.state_dict())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.shd is not None:
            self.shd.load_state_dict(_without_prefix("shd", state))
        self.baselines.load_state_dict(_without_prefix("baselines", state))


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


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.contiguous() for name, tensor in state.items()}


def _without_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mine = f"{prefix}/"
    return {name.removeprefix(mine): tensor for name, tensor in state.items() if name.startswith(mine)}
