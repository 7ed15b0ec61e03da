"""The batches of any step, by index: which images, at which noise and timesteps, follow from (seed, step, sample)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor
from torch.utils.data import Sampler

from shd_diffusion.config import TrainConfig
from shd_diffusion.data.source import Source
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import Condition, drop_condition
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.mdtv2 import num_kept_tokens
from shd_diffusion.randomness import generator
from shd_diffusion.training.mixing import mixed_batches

# --- which images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchLayout:
    """How the images of a step are dealt to processes, and each process's to forward passes.

    Every process makes the same number of passes; their sizes differ by one at most.

    Attributes:
        batch_size: images a step, over all processes.
        micro_batch_size: images a pass, at most; None for one pass a step.
        processes: how many there are.
        process: which of them this is.
    """

    batch_size: int
    micro_batch_size: int | None = None
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        if self.batch_size // self.processes < self.num_passes:
            raise ValueError(
                f"{self.batch_size} images a step are too few for {self.processes} processes of "
                f"{self.num_passes} passes each; raise batch_size or micro_batch_size"
            )

    @property
    def num_passes(self) -> int:
        """Forward passes a step, of each process."""
        largest_share = ceil(self.batch_size / self.processes)
        return ceil(largest_share / (self.micro_batch_size or largest_share))

    @property
    def passes(self) -> list[range]:
        """Places in the step's batch that this process takes, pass by pass."""
        start, stop = (self.batch_size * p // self.processes for p in (self.process, self.process + 1))
        cuts = [start + (stop - start) * i // self.num_passes for i in range(self.num_passes + 1)]
        return [range(*cut) for cut in pairwise(cuts)]

    def share(self, images: int) -> float:
        """What the mean over a pass of so many images counts, that the mean of the gradients over all processes is
        the gradient of the mean over the step's batch."""
        return images * self.processes / self.batch_size


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    return torch.randperm(length, generator=generator(seed, "order", epoch))


@lru_cache(maxsize=2)
def _epoch_batches(seed: int, epoch: int, batch_size: int, groups: tuple[range, ...]) -> list[list[int]]:
    """An epoch over images of several sizes: whole batches of one size each, in any order.

    What is left of a size waits for another epoch; of one with too few images for a batch they come several times.
    """
    batches = []
    for number, group in enumerate(groups):
        order = torch.randperm(len(group), generator=generator(seed, "order", epoch, number)) + group.start
        copies = order.repeat(ceil(batch_size / len(order)))
        batches += [
            copies[start : start + batch_size].tolist()
            for start in range(0, max(len(order), batch_size) - batch_size + 1, batch_size)
        ]
    shuffled = torch.randperm(len(batches), generator=generator(seed, "batches", epoch))
    return [batches[place] for place in shuffled]


def grouped_step_indices(seed: int, step: int, batch_size: int, groups: Sequence[range]) -> list[int]:
    """As `step_indices` for images of several sizes: those of a step are of one size."""
    length = sum(map(len, groups))
    if len(groups) == 1:
        return step_indices(seed, step, batch_size, length)
    per_epoch = sum(max(1, len(group) // batch_size) for group in groups)
    epoch, place = divmod(step, per_epoch)
    return [index + epoch * length for index in _epoch_batches(seed, epoch, batch_size, tuple(groups))[place]]


def step_indices(seed: int, step: int, batch_size: int, length: int) -> list[int]:
    """Images that a step sees, over all processes, as `Source.batches` numbers them; an epoch's end may fall inside."""
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, position = divmod(step * batch_size + len(indices), length)
        rest = position + batch_size - len(indices)
        indices += (_epoch_order(seed, epoch, length)[position:rest] + epoch * length).tolist()
    return indices


class StepSampler(Sampler[list[int]]):
    """Indices for each pass of one process, from any step on."""

    def __init__(
        self, seed: int, groups: Sequence[range], layout: BatchLayout, first_step: int, last_step: int
    ) -> None:
        self.seed, self.groups, self.layout = seed, groups, layout
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = grouped_step_indices(self.seed, step, self.layout.batch_size, self.groups)
            for places in self.layout.passes:
                yield [indices[place] for place in places]

    def __len__(self) -> int:
        return len(self.steps) * self.layout.num_passes


# --- their noise -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepNoise:
    """What is random about B samples of a step.

    Attributes:
        shares: u in [0, 1), (B,), float64: where in the schedule the timesteps lie.
        dropped: whose condition is dropped, (B,).
        flipped: which images are mirrored, (B,).
        noise: (B, C, H, W).
        latent_noise: what latents are sampled with, (B, C, H, W); None where none is needed.
        token_order: the order in which masking keeps tokens, (B, N); None without masking.
        guidance: the guidance scales that the models are told, (B,); None where they are told none.
    """

    shares: Tensor
    dropped: Tensor
    flipped: Tensor
    noise: Tensor
    latent_noise: Tensor | None = None
    token_order: Tensor | None = None
    guidance: Tensor | None = None


@dataclass(frozen=True)
class NoiseSettings:
    """What `draw_noise` draws: for samples of a shape, of which a share has its condition dropped.

    A guidance scale is drawn evenly from a range.
    """

    shape: tuple[int, ...]
    condition_dropout: float = 0.0
    timestep_sampling: str = "uniform"
    latent_noise: bool = False
    tokens: int = 0
    guidance_range: tuple[float, float] | None = None


def noise_settings(train: TrainConfig, source: Source, tokens: int = 0) -> NoiseSettings:
    """What training by a config draws for samples of a source; `tokens` are those of masked passes."""
    scales = train.guidance_range
    return NoiseSettings(
        source.shape,
        train.condition_dropout,
        train.timestep_sampling,
        source.needs_noise,
        tokens,
        None if scales is None else (scales[0], scales[1]),
    )


def draw_noise(seed: int, step: int | str, places: range, settings: NoiseSettings) -> StepNoise:
    """The noise of some places in a step's batch; teacher and student share it, and all variants of one seed.

    What is no step has a name.

    Each place has a generator of its own, so a process draws for its own samples only. `logit_normal` timesteps are
    the sigmoid of a standard normal (Esser et al. 2024, section 3.1).
    """
    sources = [generator(seed, "sample", step, place) for place in places]
    shares, dropped, flipped = torch.stack(
        [torch.rand(3, generator=source, dtype=torch.float64) for source in sources]
    ).T
    if settings.timestep_sampling == "logit_normal":
        shares = torch.special.ndtri(shares).sigmoid()

    def normal() -> Tensor:
        return torch.stack([torch.randn(settings.shape, generator=source) for source in sources])

    return StepNoise(
        shares=shares,
        dropped=dropped < settings.condition_dropout,
        flipped=flipped < 0.5,
        noise=normal(),
        latent_noise=normal() if settings.latent_noise else None,
        token_order=torch.stack([torch.randperm(settings.tokens, generator=source) for source in sources])
        if settings.tokens
        else None,
        guidance=torch.stack(
            [torch.empty(()).uniform_(*settings.guidance_range, generator=source) for source in sources]
        )
        if settings.guidance_range
        else None,
    )


# --- batches -----------------------------------------------------------------------------------------------------


def make_batch(
    source: Source,
    process: ForwardProcess,
    items: Mapping[str, Tensor],
    noise: StepNoise,
    null: Condition,
    device: torch.device,
    kept_tokens: int | None = None,
) -> Batch:
    """Noised samples on a device.

    Args:
        items: B raw items, as `source.batches` gives them.
        null: what a dropped condition is replaced by, (1, ...) by argument; an entry of the items that it lacks and
            that is no mask of tokens is the model's no concern.
        kept_tokens: so many tokens stay in a masked pass; None without one.
    """

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    items = {name: moved(item) for name, item in items.items()}
    latent_noise = None if noise.latent_noise is None else moved(noise.latent_noise)
    clean = source.clean(items, moved(noise.flipped), latent_noise)
    drawn, timesteps = (
        moved(noise.noise),
        moved(process.timesteps(noise.shares)),
    )  # shares are float64, which not every device has
    condition = drop_condition(source.condition(items), null, moved(noise.dropped))
    if noise.guidance is not None:  # what the data have is for a scale of 1
        condition["guidance"] = condition["guidance"] * moved(noise.guidance)
    mask = {}
    if kept_tokens is not None and noise.token_order is not None:
        mask = {"ids_keep": moved(noise.token_order[:, :kept_tokens])}
    return Batch(
        clean=clean,
        noise=drawn,
        noised=process.noised(clean, drawn, timesteps),
        timesteps=timesteps,
        condition=condition,
        mask=mask,
        null=null,
    )


class BatchLoader:
    """This process's share of every step from `start` on, noised; steps are asked for in order.

    Args:
        null: see `make_batch`.
        steps: the first step, and the one after the last.
        mask_ratio: least share of tokens that masked passes drop; 0 for no such passes.
        mix: how images are mixed that terms with a teacher see, see mixing.py; `none` for those as they are.
    """

    def __init__(
        self,
        source: Source,
        process: ForwardProcess,
        null: Condition,
        seed: int,
        layout: BatchLayout,
        settings: NoiseSettings,
        device: torch.device,
        steps: tuple[int, int],
        mask_ratio: float = 0.0,
        mix: str = "none",
    ) -> None:
        self.source, self.process, self.null, self.seed = source, process, null, seed
        self.layout, self.settings, self.device, self.mask_ratio = layout, settings, device, mask_ratio
        self.mix = mix
        self.items = source.batches(StepSampler(seed, source.groups, layout, *steps))

    def step(self, step: int) -> Iterator[tuple[Batch, float]]:
        """The batch of each pass of a step, and what its mean counts."""
        kept = None
        if self.mask_ratio:
            kept = num_kept_tokens(self.settings.tokens, self.mask_ratio, generator(self.seed, "mask", step))
        for places in self.layout.passes:
            items = next(self.items)
            settings = replace(self.settings, shape=self.source.shape_of(items))
            noise = draw_noise(self.seed, step, places, settings)
            batch = make_batch(self.source, self.process, items, noise, self.null, self.device, kept)
            if self.mix != "none":
                mixed = mixed_batches(self.mix, batch, self.process, self.seed, step, places)
                batch = replace(batch, mixed=mixed)
            yield batch, self.layout.share(len(places))
