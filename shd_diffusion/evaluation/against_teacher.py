"""Student against teacher at equal noise and equal condition: how far their images are apart, one by one.

It needs no data set. Since both sides of a pair start from the same noise, a few dozen prompts tell students apart that
metrics of whole sets of images do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.lpips import LPIPS
from shd_diffusion.models.last_step import last_step
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar
from shd_diffusion.sampling.image_sampler import ImageSampler
from shd_diffusion.statistics import Estimate, bootstrap

Measures = dict[str, list[float]]
"""Numbers by measure, one an image."""


def against_teacher(
    student: ImageSampler,
    teacher: ImageSampler,
    indices: Sequence[int],
    extractor: Extractor,
    lpips: LPIPS | None = None,
    pass_size: int = 1,
) -> Measures:
    """How far each image of the student is from the teacher's, see `measure`; in the order of the indices.

    Args:
        student, teacher: of one class of pipelines, on one device, with the same prompts or labels, seed and arguments,
            such as `ByPrompt(pipeline, config, prompts)`: image j of both starts from the same noise, by (seed, j). The
            pipelines may share parts, the scheduler too.
        indices: of the images, N.
        extractor: what features are compared.
        lpips: None leaves that measure out.
        pass_size: images that go through a model at once.

    Raises:
        ValueError: the pipelines are of different classes, or images are not finite.
    """
    kinds = [type(sampler.pipeline) for sampler in (student, teacher)]
    if kinds[0] is not kinds[1]:
        raise ValueError(f"a {kinds[0].__name__} and a {kinds[1].__name__} do not compare")
    state, count = processes(), len(indices)
    extractor, lpips = extractor.to(state.device), None if lpips is None else lpips.to(state.device)
    passes = [list(indices[start : start + pass_size]) for start in range(0, count, pass_size)]
    found: list[dict[str, Tensor]] = []
    with (
        state.split_between_processes(passes) as mine,
        progress_bar(count, "student against teacher", "image", visible=state.is_main_process) as bar,
    ):
        for each in mine:
            latents, images = generate(student, each)
            found.append(measure(latents, images, *generate(teacher, each), extractor, lpips))
            bar.update(min(len(each) * state.num_processes, count - bar.n))
    found = gather_object(found)
    return {name: torch.cat([part[name] for part in found]).tolist() for name in found[0]}


def generate(sampler: ImageSampler, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The final latents (B, ...) of these images, and the images, 8-bit (B, 3, H, W)."""
    sampler.pipeline.set_progress_bar_config(disable=True)
    with last_step(sampler.pipeline.scheduler) as latents:
        images = sampler.images(indices)
    return latents[-1], images


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
