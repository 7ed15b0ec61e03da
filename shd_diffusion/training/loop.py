"""The training loop on accelerate: any loss, any denoiser, from the last checkpoint to the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.config import RunConfig, TrainConfig
from shd_diffusion.errors import DivergedError
from shd_diffusion.losses.term import Batch
from shd_diffusion.progress import progress_bar
from shd_diffusion.randomness import generator
from shd_diffusion.run_folder import RunFolder, run_name
from shd_diffusion.training.batches import BatchLayout, BatchLoader
from shd_diffusion.training.checkpoints import CheckpointFolder, checkpoint_path
from shd_diffusion.training.interruption import InterruptedRun, Interruption
from shd_diffusion.training.metrics_logger import MetricsLogger
from shd_diffusion.training.objectives import TrainingLoss
from shd_diffusion.training.train_state import TrainState, whole

Validation = Callable[[ModelMixin], tuple[dict[str, Any], Tensor | None]]
"""Metrics of a model by name, and a picture of its samples, 8-bit (H, W, 3), if any. Every process calls it."""


def fit(
    model: ModelMixin,
    loss: TrainingLoss,
    make_loader: Callable[[BatchLayout, int], BatchLoader],
    run: RunFolder,
    config: RunConfig,
    accelerator: Accelerator,
    start: int = 0,
    validations: Sequence[Validation] = (),
    finish: bool = False,
) -> tuple[ModelMixin, int]:
    """Train a denoiser, from the weights that it has or from a checkpoint of the run.

    Args:
        model: with the weights to start from.
        loss: gives the terms of the loss; open.
        make_loader: from the layout and the first step to this process's batches.
        run: gets metrics and checkpoints.
        config: of the run; noise, timesteps, dropped conditions and data order follow from its seed and the step.
        accelerator: see `make_accelerator`.
        start: the step whose checkpoint it goes on from, see `CheckpointFolder.latest`; 0 for none.
        validations: of the averaged model, every `config.train.validation.every` steps.
        finish: take no step, but what the last checkpoint has.

    Returns:
        The model with its averaged weights, and how many steps it has taken.

    Raises:
        UserError: a checkpoint cannot be written.
        InterruptedRun: a signal has ended it; its checkpoint is written.
        DivergedError: too many steps in a row had no finite gradient.
    """
    train = config.train
    layout = BatchLayout(
        train.batch_size, train.micro_batch_size, accelerator.num_processes, accelerator.process_index
    )
    teacher = loss.teacher_parameters(), loss.teacher_rate
    state = TrainState.prepare(model, loss.parameters(), train, accelerator, teacher)
    checkpoints = CheckpointFolder(
        run.checkpoints, run.identity(config), accelerator, train.keep_last, train.keep_every
    )
    good, end = start, start if finish else train.max_steps
    if start:
        checkpoints.load(start, state, loss.kept)
    if accelerator.is_main_process:
        run.forget_after(start)
    loader = make_loader(layout, start)
    logger = MetricsLogger(run, accelerator, train.batch_size, start)

    state.wrapped.train()
    skipped = 0
    bar = progress_bar(
        train.max_steps, f"train {run_name(run.path)}", "step", start, accelerator.is_main_process
    )
    with bar, Interruption(accelerator) as interruption:
        for step in range(start, end):
            seed_model(
                generator(config.seed, "model", step, layout.process).initial_seed(), accelerator.device
            )
            rate = float(state.lr_scheduler.get_last_lr()[0])  # of this step; after it, the next one's
            terms, norm = take_step(
                state, loss, loader.step(step), layout.num_passes, step, train, accelerator
            )
            bar.update()
            done = step + 1
            last = done == train.max_steps
            validating = bool(validations) and is_due(done, train.validation.every)
            if not norm.isfinite():
                skipped += 1
                culprits = logger.log_skipped(done, terms)
                if skipped == train.max_skipped_steps or (last and not state.ema.optimization_step):
                    what = f"{skipped} steps in a row had no finite {' or '.join(culprits)} and were left out"
                    raise _diverged(run, what, good)
            else:
                skipped = 0
                if last or validating or is_due(done, train.log_every):
                    by_block = {
                        name: sum_ * layout.share(1) for name, sum_ in loss.shd_by_block(step).items()
                    }
                    entry = logger.entry(done, terms, loss.weights(step), norm, rate, by_block)
                    if validating:
                        with state.averaged() as averaged:
                            entry["validation"] = _validate(averaged, validations, logger, done)
                    logger.log(entry)
                    bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            signum = interruption.noted()
            if last or signum or (is_due(done, train.checkpoint_every) and not skipped):
                if not state.is_finite():  # its last step has made them so
                    raise _diverged(run, "weights that are not finite", good)
                with logger.apart():
                    checkpoints.save(done, state, loss.kept)
                good = done
            if signum and not last:
                raise InterruptedRun(
                    f"{run.path}: interrupted after step {done}; the same command goes on from there", signum
                )
    return state.finish(), end


def _validate(
    model: ModelMixin, validations: Sequence[Validation], logger: MetricsLogger, done: int
) -> dict[str, Any]:
    """The metrics of all validations; pictures are logged."""
    metrics: dict[str, Any] = {}
    for validation in validations:
        found, picture = validation(model)
        metrics |= found
        if picture is not None:
            logger.log_image(done, picture)
    return metrics


def take_step(
    state: TrainState,
    loss: TrainingLoss,
    batches: Iterator[tuple[Batch, float]],
    num_passes: int,
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step over all passes: this process's mean terms, and the gradient's norm.

    Where the norm is not finite the step is left out: weights, their average and the optimiser stay as they are.

    Args:
        state: what trains.
        loss: on a batch.
        batches: of each pass, and what its mean counts in the step's.
        num_passes: how many there are.
        step: counted from 0.
        config: tells the largest norm.
        accelerator: of the run.
    """
    weights = loss.weights(step)
    sums: dict[str, Tensor] = {}
    for number, (batch, share) in enumerate(batches, start=1):
        # gradients are summed over the processes once, in the last backward; a sharded model's, for room, in each
        with nullcontext() if number == num_passes else accelerator.no_sync(state.wrapped):
            with accelerator.autocast():
                terms = loss(state.wrapped, batch, step)
            total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            accelerator.backward(total * share)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach() * share
    average_gradients(loss.parameters_at(step), accelerator)
    parameters = [*state.parameters, *loss.parameters()]
    norm = whole(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
    of_teacher = nn.utils.clip_grad_norm_(loss.teacher_parameters(), config.max_grad_norm)
    norm = norm if of_teacher.isfinite() else of_teacher
    finite = bool(norm.isfinite())
    if not finite:
        state.optimizer.zero_grad()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    if finite:
        state.ema.step(state.parameters)
    return sums, norm


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes, in place, of gradients that no distributed wrapper takes care of; 0 for none."""
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, "mean")


def seed_model(seed: int, device: torch.device) -> None:
    """Seed what is random inside a model, dropout for one; as `torch.manual_seed`, which takes long without a GPU."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def _diverged(run: RunFolder, what: str, good: int) -> DivergedError:
    """Why a run whose numbers are not finite is ended, and where it can be taken up."""
    checkpoint = checkpoint_path(run.checkpoints, good) if good else "none, the run had just begun"
    return DivergedError(
        f"{run.path}: {what}; try a lower train.learning_rate or loss weight. The last good checkpoint: {checkpoint}"
    )
