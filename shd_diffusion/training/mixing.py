"""Images mixed with others, for terms with a teacher, who says what is right of what no data set has.

`mixup`         x = λ a + (1 − λ) b; Zhang et al. 2018, in distillation Beyer et al. 2022
`cutmix`        x = M a + (1 − M) b, where M is 0 in a box of area 1 − λ around a uniform centre, cut off at the image's
                edges, and 1 elsewhere; Yun et al. 2019, equations 1 and 2
`cutmix_pick`   of two such x the harder one; after CutMixPick, Wang et al. 2022 ("What Makes a Good Data Augmentation
                in Knowledge Distillation"), which keeps those of the largest entropy of the teacher

a is an image, b the one before it in its pass, λ uniform in [0, 1). A denoiser's prediction has no entropy: hard is
what student and teacher disagree on, as in HARD (Nie et al. 2023). Both x of an image have its noise and its timestep,
which would decide alone if images were compared with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn

from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import predict, predict_frozen
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.randomness import generator

CANDIDATES = 2
"""Of `cutmix_pick`, by image."""


def mixed_batches(
    kind: str, batch: Batch, process: ForwardProcess, seed: int, step: int, places: range
) -> tuple[Batch, ...]:
    """The batches with images mixed that one is to be picked of; one alone, but for `cutmix_pick`.

    Args:
        places: of the images in the step's batch, which λ and box follow from.
    """
    if kind == "mixup":
        shares = [torch.rand((), generator=generator(seed, "mixup", step, place)) for place in places]
        return (mix(batch, process, torch.stack(shares).view(-1, 1, 1)),)
    height, width = batch.clean.shape[-2:]
    sources = [generator(seed, "cutmix", step, place) for place in places]
    return tuple(
        mix(batch, process, torch.stack([outside_box(height, width, source) for source in sources]))
        for _ in range(CANDIDATES if kind == "cutmix_pick" else 1)
    )


def outside_box(height: int, width: int, source: torch.Generator) -> Tensor:
    """CutMix's M, (H, W)."""
    own, *centre = torch.rand(3, generator=source).tolist()
    inside = []
    for middle, length in zip(centre, (height, width), strict=True):
        half = length * sqrt(1 - own) / 2
        pixel = torch.arange(length) + 0.5
        inside.append((pixel - middle * length).abs() < half)
    return 1 - torch.outer(*(each.float() for each in inside))


def mix(batch: Batch, process: ForwardProcess, own: Tensor) -> Batch:
    """The same noise, timesteps and conditions on images mixed with the ones before them.

    Args:
        own: each image's own share, (B, H or 1, W or 1).
    """
    own = own.to(batch.clean).view(len(own), *[1] * (batch.clean.ndim - 3), *own.shape[1:])
    clean = torch.lerp(batch.clean.roll(1, 0), batch.clean, own)
    return replace(batch, clean=clean, noised=process.noised(clean, batch.noise, batch.timesteps))


@torch.no_grad()
def pick(candidates: Sequence[Batch], student: nn.Module, teacher: nn.Module) -> Batch:
    """Of each image the candidate whose noise student and teacher tell most differently, by the squared distance."""
    channels = candidates[0].clean.shape[1]
    distances = []
    for batch in candidates:
        seen = batch.noised, batch.timesteps, batch.condition
        both = [
            predicted[:, :channels] for predicted in (predict(student, *seen), predict_frozen(teacher, *seen))
        ]
        distances.append((both[0] - both[1]).square().flatten(1).mean(1))
    hardest = torch.stack(distances).argmax(0)
    place = torch.arange(len(hardest), device=hardest.device)
    clean, noised = (
        torch.stack(images)[hardest, place]
        for images in ([batch.clean for batch in candidates], [batch.noised for batch in candidates])
    )
    return replace(candidates[0], clean=clean, noised=noised)
