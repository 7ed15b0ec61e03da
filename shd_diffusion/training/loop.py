"""The training loop on accelerate: any method, any denoiser, from the last checkpoint to the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from shd_diffusion.config import RunConfig, TrainConfig
from shd_diffusion.data.source import Source
from shd_diffusion.errors import UserError
from shd_diffusion.losses.denoising import ForwardProcess
from shd_diffusion.models.adapter import null_label, num_tokens, sample_shape
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar
from shd_diffusion.randomness import generator
from shd_diffusion.run_folder import RunFolder, flatten
from shd_diffusion.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from shd_diffusion.training.data_order import Layout, StepSampler
from shd_diffusion.training.draws import draw
from shd_diffusion.training.methods import Batch, Method, make_batch

Watch = Callable[[ModelMixin], dict[str, float]]


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """The accelerator of a run. The learning rate follows the optimiser's steps, however many processes there are.

    Raises:
        UserError: other than the wanted number of processes was launched, or a tracker is not installed.
    """
    for tracker in config.trackers:
        if tracker not in map(str, get_available_trackers()):
            raise UserError(f"key `train.trackers`: {tracker} is not installed; `pip install {tracker}`")
    processes()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        step_scheduler_with_optimizer=False,
        log_with=config.trackers or None,
        project_dir=folder,
    )
    if config.num_processes not in (None, accelerator.num_processes):
        raise UserError(
            f"key `train.num_processes` asks for {config.num_processes}, but {accelerator.num_processes} were "
            "launched; on CPUs `accelerate launch --cpu` starts one whatever it is told, `torchrun` does not"
        )
    return accelerator


@dataclass
class Training:
    """What changes while a run trains: a model with its optimiser, learning rate and averaged weights.

    `extra` are the method's own parameters: trained with the model, neither averaged nor a part of it.
    """

    model: ModelMixin
    extra: list[nn.Parameter]
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    average: EMAModel

    @classmethod
    def prepare(
        cls, model: ModelMixin, extra: list[nn.Parameter], config: TrainConfig, accelerator: Accelerator
    ) -> Training:
        """Everything on its device, ready for step 0."""
        parameters = list(model.to(accelerator.device).parameters())
        optimizer = torch.optim.AdamW(
            [*parameters, *extra], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        rate = get_scheduler(
            config.lr_schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        average = EMAModel(parameters, decay=config.ema_decay, foreach=True)
        wrapped, optimizer, rate = accelerator.prepare(model, optimizer, rate)
        return cls(model, extra, wrapped, optimizer, rate, average)

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The model with its averaged weights, in evaluation mode, for as long as the context lasts."""
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self.average.restore(self.model.parameters())


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
        watch: figures of the averaged model, every `config.watch.every` steps.
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
        load_checkpoint(run.checkpoints, start, accelerator, training.average, method)
    if accelerator.is_main_process:
        run.forget_after(start)

    items = source.batches(StepSampler(config.seed, len(source), layout, start, train.max_steps))
    shape, null = sample_shape(model), null_label(model)
    masking = (num_tokens(model), train.mask_ratio) if train.mask_ratio else None

    def batches(step: int) -> Iterator[Batch]:
        drawn = draw(
            config.seed,
            step,
            layout.step_size,
            shape,
            process.num_timesteps,
            train.label_drop,
            source.needs_noise,
            config.diffusion.timestep_sampling,
            masking,
        )
        for micro_step in range(layout.accumulation):
            raw, labels = (part.to(accelerator.device, non_blocking=True) for part in next(items))
            mine = drawn.take(layout.share(micro_step), accelerator.device)
            yield make_batch(process, source.clean(raw, mine.flipped, mine.latent_noise), labels, mine, null)

    training.wrapped.train()
    began, logged, skipped = time.perf_counter(), start, 0
    bar = progress_bar(train.max_steps, f"train {run.path.name}", "step", start, accelerator.is_main_process)
    with bar:
        for step in range(start, train.max_steps):
            torch.manual_seed(generator(config.seed, "model", step, layout.process).initial_seed())
            weights = method.weights(step)
            terms, norm = take_step(training, method, batches(step), weights, step, train, accelerator)
            bar.update()
            done = step + 1
            last, watching = done == train.max_steps, watch is not None and is_due(done, train.watch.every)
            entry: dict[str, Any] = {"step": done, "images": done * layout.step_size}
            if norm.isfinite():
                skipped = 0
            else:
                skipped += 1
                values = _mean_over_processes(terms, accelerator)
                entry["skipped"] = [name for name in values if not math.isfinite(values[name])] or [
                    "gradient"
                ]
                _record(entry, run, accelerator)
                if skipped == train.max_skipped_steps:
                    raise UserError(
                        f"{run.path}: {skipped} steps in a row had no finite {' or '.join(entry['skipped'])} and "
                        "were left out; try a lower train.learning_rate or loss weight. The last good checkpoint "
                        f"is step {latest_checkpoint(run.checkpoints, accelerator)}"
                    )
            if not skipped and (last or watching or is_due(done, train.log_every)):
                entry |= {
                    **summarize_terms(_mean_over_processes(terms, accelerator), weights),
                    "learning_rate": training.rate.get_last_lr()[0],
                    "gradient_norm": float(norm),
                    "seconds_per_step": (time.perf_counter() - began) / (done - logged),
                }
                if watch is not None and watching:
                    with training.averaged() as averaged:
                        entry["watch"] = watch(averaged)
                _record(entry, run, accelerator)
                bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                began, logged = time.perf_counter(), done
            if last or is_due(done, train.checkpoint_every):
                save_checkpoint(
                    run.checkpoints,
                    done,
                    accelerator,
                    training.average,
                    method,
                    train.keep_last,
                    train.keep_every,
                )
    training.average.copy_to(model.parameters())
    return model.eval()


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
                parameters = [*training.model.parameters(), *training.extra]
                norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                if not norm.isfinite():
                    training.optimizer.zero_grad()
            training.optimizer.step()
            training.optimizer.zero_grad()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.gradient_accumulation_steps
    training.rate.step()
    if norm.isfinite():
        training.average.step(training.model.parameters())
    return sums, norm


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes, in place, of gradients that no distributed wrapper takes care of."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def summarize_terms(values: dict[str, float], weights: dict[str, float]) -> dict[str, Any]:
    """Every term unweighted, weighted, and as a share of the loss, so that none dwarfs the others unnoticed."""
    weighted = {name: weights[name] * value for name, value in values.items()}
    loss = sum(weighted.values())
    terms = {
        name: {
            "value": values[name],
            "weighted": weighted[name],
            "share": weighted[name] / loss if loss else 0.0,
        }
        for name in values
    }
    return {"loss": loss, "terms": terms}


def _record(entry: dict[str, Any], run: RunFolder, accelerator: Accelerator) -> None:
    """A line in the run's metrics, and the same numbers in the trackers."""
    if accelerator.is_main_process:
        run.log(entry)
    numbers = {key: value for key, value in flatten(entry).items() if isinstance(value, int | float)}
    accelerator.log(numbers, step=entry["step"])


def _mean_over_processes(terms: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    means = accelerator.reduce(torch.stack([*terms.values()]), "mean")
    return dict(zip(terms, means.tolist(), strict=True))
