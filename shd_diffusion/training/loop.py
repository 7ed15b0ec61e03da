"""The training loop on accelerate: any method, any denoiser, from the last checkpoint to the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.config import RunConfig, TrainConfig
from shd_diffusion.data.source import Source
from shd_diffusion.errors import DivergedError
from shd_diffusion.losses.denoising import ForwardProcess
from shd_diffusion.progress import progress_bar
from shd_diffusion.randomness import generator
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.training.checkpoints import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from shd_diffusion.training.data_order import Layout
from shd_diffusion.training.feed import Feed
from shd_diffusion.training.journal import Journal
from shd_diffusion.training.methods import Batch, Method
from shd_diffusion.training.sharding import whole
from shd_diffusion.training.state import Training

Watch = Callable[[ModelMixin], tuple[dict[str, float], Tensor]]
"""Figures of a model by name, and a picture of its samples, 8-bit (H, W, 3)."""


def fit(
    model: ModelMixin,
    method: Method,
    source: Source,
    process: ForwardProcess,
    run: RunFolder,
    config: RunConfig,
    accelerator: Accelerator,
    watch: Watch | None = None,
) -> ModelMixin:
    """Train a denoiser, continuing from the run's last checkpoint, and return it with its averaged weights.

    Args:
        model: with the weights to start from.
        method: gives the terms of the loss.
        source: what to train on.
        process: the forward process.
        run: gets metrics and checkpoints.
        config: of the run; noise, timesteps, dropped labels and data order follow from its seed and the step.
        accelerator: see `make_accelerator`.
        watch: figures and samples of the averaged model, every `config.watch.every` steps.

    Raises:
        UserError: a checkpoint cannot be written.
        DivergedError: too many steps in a row had no finite gradient.
    """
    train = config.train
    layout = Layout(
        train.batch_size,
        train.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    training = Training.prepare(model, method.parameters(), train, accelerator)
    start = latest_checkpoint(run.checkpoints, accelerator)
    if start:
        load_checkpoint(run.checkpoints, start, training, method, accelerator)
    if accelerator.is_main_process:
        run.forget_after(start)
    feed = Feed(source, process, model, config, layout, accelerator.device, start)
    journal = Journal(run, accelerator, layout.step_size, start)

    training.wrapped.train()
    skipped = 0
    bar = progress_bar(train.max_steps, f"train {run.path.name}", "step", start, accelerator.is_main_process)
    with bar:
        for step in range(start, train.max_steps):
            seed_model(
                generator(config.seed, "model", step, layout.process).initial_seed(), accelerator.device
            )
            weights = method.weights(step)
            terms, norm = take_step(training, method, feed.batches(step), weights, step, train, accelerator)
            bar.update()
            done = step + 1
            last, watching = done == train.max_steps, watch is not None and is_due(done, train.watch.every)
            if not norm.isfinite():
                skipped += 1
                culprits = journal.write_skipped(done, terms)
                if skipped == train.max_skipped_steps:
                    good = latest_checkpoint(run.checkpoints, accelerator)
                    raise DivergedError(explain_end(run, skipped, culprits, good))
            else:
                skipped = 0
                if last or watching or is_due(done, train.log_every):
                    rate, by_block = float(training.rate.get_last_lr()[0]), method.divergences(step)
                    entry = journal.record(done, terms, weights, norm, rate, by_block)
                    if watch is not None and watching:
                        with training.averaged() as averaged:
                            entry["watch"], picture = watch(averaged)
                        journal.show(done, picture)
                    journal.write(entry)
                    bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            if last or is_due(done, train.checkpoint_every):
                save_checkpoint(
                    run.checkpoints, done, training, method, accelerator, train.keep_last, train.keep_every
                )
    return training.export()


def explain_end(run: RunFolder, skipped: int, culprits: list[str], good: int) -> str:
    """Why a run that leaves out one step after the other was ended, and where it can be taken up."""
    checkpoint = checkpoint_path(run.checkpoints, good) if good else "none, the run had just begun"
    return (
        f"{run.path}: {skipped} steps in a row had no finite {' or '.join(culprits)} and were left out; try a lower "
        f"train.learning_rate or loss weight. The last good checkpoint: {checkpoint}"
    )


def seed_model(seed: int, device: torch.device) -> None:
    """Seed what is random inside a model, dropout for one; as `torch.manual_seed`, which takes long without a GPU."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def take_step(
    training: Training,
    method: Method,
    batches: Iterator[Batch],
    weights: dict[str, float],
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step over all accumulated batches: this process's mean terms, and the gradient's norm.

    Where the norm is not finite the step is left out: weights, their average and the optimiser stay as they are.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with accelerator.accumulate(training.wrapped):
            with accelerator.autocast():
                terms = method(training.wrapped, batch, step)
            accelerator.backward(sum(weights[name] * value for name, value in terms.items()))
            if accelerator.sync_gradients:
                average_gradients(training.extra, accelerator)
                parameters = [*training.parameters, *training.extra]
                norm = whole(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
                if not norm.isfinite():
                    training.optimizer.zero_grad()
            training.optimizer.step()
            training.optimizer.zero_grad()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.gradient_accumulation_steps
    training.rate.step()
    if norm.isfinite():
        training.average.step(training.parameters)
    return sums, norm


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes, in place, of gradients that no distributed wrapper takes care of."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, "mean")


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0
