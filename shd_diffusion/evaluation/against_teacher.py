"""Student against teacher at equal noise and equal condition: how far their images are apart, one by one.

It needs no data set. Since both sides of a pair start from the same noise, a few dozen prompts tell students apart that
metrics of whole sets of images do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor

from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.lpips import LPIPS
from shd_diffusion.models.last_step import last_step
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar
from shd_diffusion.randomness import generator
from shd_diffusion.statistics import Estimate, bootstrap

Measures = dict[str, list[float]]
"""Numbers by measure, one an image."""


@dataclass(frozen=True)
class Calls:
    """What both pipelines are asked for.

    Attributes:
        indices: of N images; the noise of image j follows from (seed, j), as that of `sample`.
        inputs: N values by argument of the pipelines' call: {"prompt": texts}, {"class_labels": classes}, or none.
        seed: see `indices`.
        arguments: the other arguments of the call, the same for all images.
        pass_size: images that go through a model at once.
    """

    indices: Sequence[int]
    inputs: Mapping[str, Sequence[Any]]
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pass_size: int = 1


def against_teacher(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    calls: Calls,
    extractor: Extractor,
    lpips: LPIPS | None = None,
) -> Measures:
    """How far each image of the student is from the teacher's, see `measure`; in the order of the images.

    Args:
        student, teacher: of one class, on one device; they may share parts, the scheduler too.
        extractor: what features are compared.
        lpips: None leaves that measure out.

    Raises:
        ValueError: the pipelines are of different classes.
    """
    if type(student) is not type(teacher):
        raise ValueError(f"a {type(student).__name__} and a {type(teacher).__name__} do not compare")
    state, count = processes(), len(calls.indices)
    extractor, lpips = extractor.to(state.device), None if lpips is None else lpips.to(state.device)
    passes = [range(start, min(start + calls.pass_size, count)) for start in range(0, count, calls.pass_size)]
    found: list[dict[str, Tensor]] = []
    with (
        state.split_between_processes(passes) as mine,
        progress_bar(count, "student against teacher", "image", visible=state.is_main_process) as bar,
    ):
        for places in mine:
            of_student, of_teacher = (generate(each, calls, places) for each in (student, teacher))
            found.append(measure(*of_student, *of_teacher, extractor, lpips))
            bar.update(min(len(places) * state.num_processes, count - bar.n))
    found = gather_object(found)
    return {name: torch.cat([part[name] for part in found]).tolist() for name in found[0]}


@torch.no_grad()
def generate(pipeline: DiffusionPipeline, calls: Calls, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The final latents (B, ...) of some of the images, and the images, 8-bit (B, 3, H, W).

    Args:
        places: which of `calls.indices`.
    """
    inputs: dict[str, Any] = {
        name: [values[place] for place in places] for name, values in calls.inputs.items()
    }
    if not inputs:  # unconditional
        inputs = {"num_images": len(places)}
    pipeline.set_progress_bar_config(disable=True)
    with last_step(pipeline.scheduler) as latents:
        images = pipeline(
            **inputs,
            **calls.arguments,
            generator=[generator(calls.seed, "sample", calls.indices[place]) for place in places],
            output_type="pt",
            return_dict=False,
        )[0]
    return latents[-1], to_rgb_bytes(images * 2 - 1)


@torch.no_grad()
def measure(
    latents: Tensor,
    images: Tensor,
    teacher_latents: Tensor,
    teacher_images: Tensor,
    extractor: Extractor,
    lpips: LPIPS | None,
) -> dict[str, Tensor]:
    """The measures of B pairs, (B,) each, float64.

    `latent_mse`: mean squared error of the final latents; `latent_relative_mse`: over the mean square of the teacher's;
    `feature_cosine`: of the images' features; `lpips`.

    Args:
        latents, teacher_latents: (B, ...).
        images, teacher_images: 8-bit (B, 3, H, W).
    """
    wanted = teacher_latents.double().flatten(1)
    error = (latents.double().flatten(1) - wanted).square().mean(dim=1)
    features = [extractor(side).double() for side in (images, teacher_images)]
    found = {
        "latent_mse": error,
        "latent_relative_mse": error / wanted.square().mean(dim=1),
        "feature_cosine": F.cosine_similarity(*features),
    }
    if lpips is not None:
        found["lpips"] = lpips(images, teacher_images).double()
    return {name: values.cpu() for name, values in found.items()}


def summarise(measures: Mapping[str, Sequence[float]], seed: int = 0) -> dict[str, Estimate]:
    """The mean of each measure with its 95 % interval by the bootstrap over the images."""
    return {name: bootstrap(values, seed) for name, values in measures.items()}


def paired_difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], seed: int = 0
) -> dict[str, Estimate]:
    """Second student minus first, by each measure that both have, with its 95 % interval by the bootstrap over pairs.

    Raises:
        ValueError: they are of different numbers of images.
    """
    return {
        name: bootstrap([b - a for a, b in zip(values, second[name], strict=True)], seed)
        for name, values in first.items()
        if name in second
    }
