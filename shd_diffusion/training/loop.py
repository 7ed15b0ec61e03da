"""The training loop on accelerate: any method, any denoiser, from the last checkpoint to the last step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shd_diffusion.config import TrainConfig
from shd_diffusion.models.adapter import null_label, sample_shape
from shd_diffusion.progress import progress_bar
from shd_diffusion.training.checkpoints import checkpoint_steps, load_checkpoint, save_checkpoint
from shd_diffusion.training.data_order import Layout, StepSampler
from shd_diffusion.training.draws import draw
from shd_diffusion.training.methods import Method, make_batch
from shd_diffusion.run_folder import RunFolder

Watch = Callable[[ModelMixin], dict[str, float]]


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run. The learning rate follows the optimiser's steps, however many processes there are."""
    return Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        step_scheduler_with_optimizer=False,
    )


def fit(
    model: ModelMixin,
    method: Method,
    dataset: Dataset,
    schedule: DDPMScheduler,
    run: RunFolder,
    config: TrainConfig,
    seed: int,
    accelerator: Accelerator,
    watch: Watch | None = None,
) -> ModelMixin:
    """Train a denoiser, continuing from the run's last checkpoint, and return it with its averaged weights.

    Args:
        model: with the weights to start from.
        method: gives the terms of the loss.
        dataset: pairs of an image (C, H, W) in [-1, 1] and a label.
        schedule: the forward process.
        run: gets metrics and checkpoints.
        config: steps, batch size, optimiser.
        seed: noise, timesteps, dropped labels and data order follow from it and the step.
        accelerator: see `make_accelerator`.
        watch: figures of the averaged model, every `config.watch.every` steps.
    """
    layout = Layout(
        config.batch_size,
        config.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    shape, null = sample_shape(model), null_label(model)
    parameters = list(model.to(accelerator.device).parameters())
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    rate = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    wrapped, optimizer, rate = accelerator.prepare(model, optimizer, rate)

    steps_saved = checkpoint_steps(run.checkpoints)
    start = steps_saved[-1] if steps_saved else 0
    if start:
        load_checkpoint(run.checkpoints, start, accelerator, ema, method)
    if accelerator.is_main_process:
        run.forget_after(start)

    sampler = StepSampler(seed, len(dataset), layout, start, config.max_steps)  # type: ignore[arg-type]
    batches = iter(DataLoader(dataset, batch_sampler=sampler))
    wrapped.train()
    began, logged = time.perf_counter(), start
    with progress_bar(
        config.max_steps, f"train {run.path.name}", "step", start, accelerator.is_main_process
    ) as bar:
        for step in range(start, config.max_steps):
            drawn = draw(
                seed, step, layout.step_size, shape, schedule.config["num_train_timesteps"], config.label_drop
            )
            weights = method.weights(step)
            sums: dict[str, Tensor] = {}
            for micro_step in range(layout.accumulation):
                images, labels = next(batches)
                with accelerator.accumulate(wrapped):
                    batch = make_batch(
                        schedule,
                        images.to(accelerator.device),
                        labels.to(accelerator.device),
                        drawn.take(layout.share(micro_step), accelerator.device),
                        null,
                    )
                    with accelerator.autocast():
                        terms = method(wrapped, batch, step)
                    accelerator.backward(sum(weights[name] * value for name, value in terms.items()))
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach() / layout.accumulation
            rate.step()
            ema.step(parameters)
            bar.update()

            done = step + 1
            if done % config.log_every == 0 or done == config.max_steps:
                values = dict(zip(sums, accelerator.reduce(torch.stack([*sums.values()]), "mean").tolist(), strict=True))
                entry = {
                    "step": done,
                    "images": done * layout.step_size,
                    **summarize_terms(values, weights),
                    "learning_rate": rate.get_last_lr()[0],
                    "gradient_norm": float(norm),
                    "seconds_per_step": (time.perf_counter() - began) / (done - logged),
                }
                if watch and config.watch.every and done % config.watch.every == 0:
                    entry["watch"] = _with_average(ema, model, watch)
                if accelerator.is_main_process:
                    run.log(entry)
                bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                began, logged = time.perf_counter(), done
            if done % config.checkpoint_every == 0 or done == config.max_steps:
                save_checkpoint(run.checkpoints, done, accelerator, ema, method, config.keep_last)
    ema.copy_to(parameters)
    return model.eval()


def summarize_terms(values: dict[str, float], weights: dict[str, float]) -> dict[str, object]:
    """Every term unweighted, weighted, and as a share of the loss, so that none dwarfs the others unnoticed."""
    weighted = {name: weights[name] * value for name, value in values.items()}
    loss = sum(weighted.values())
    terms = {
        name: {"value": values[name], "weighted": weighted[name], "share": weighted[name] / loss if loss else 0.0}
        for name in values
    }
    return {"loss": loss, "terms": terms}


def _with_average(ema: EMAModel, model: ModelMixin, watch: Watch) -> dict[str, float]:
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        return watch(model)
    finally:
        model.train()
        ema.restore(model.parameters())
