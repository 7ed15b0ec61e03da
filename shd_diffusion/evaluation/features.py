"""Images to features: in batches, read ahead by threads, on any number of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate.utils import gather_object
from torch import Tensor

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.extractors import CLIP, Extractor, image_size_of
from shd_diffusion.evaluation.images import ImageSet
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar

READERS = 4
AHEAD = 4  # batches


@torch.no_grad()
def extract_features(images: ImageSet, extractor: Extractor, batch_size: int, name: str) -> dict[str, Tensor]:
    """The features of all images by their role, (N, D) each, on the CPU and in the order of the images.

    Every process extracts a contiguous part of the images, and all of them get the whole.

    Args:
        name: shown in the progress bar, which is on standard error.

    Raises:
        UserError: an image that cannot be read, one of another size, or features that are not finite.
    """
    size = image_size_of(extractor.name)
    if size is not None and images[0].shape[1:] != (size, size):
        raise UserError(
            f"{images.name(0)}: is {_size(images[0].shape)}, but `{extractor.name}` takes {size}×{size} only; "
            "set `evaluate.extractor` to another, or `evaluate.resize` if these are the reference"
        )
    state = processes()
    extractor = extractor.to(state.device)
    with state.split_between_processes(list(range(len(images)))) as indices:
        parts: list[dict[str, Tensor]] = []
        with progress_bar(len(indices), f"features of {name}", "image", visible=state.is_main_process) as bar:
            for batch in _batches(images, indices, batch_size):
                roles = extractor.roles(batch.to(state.device, non_blocking=True))
                parts.append({role: values.cpu() for role, values in roles.items()})
                bar.update(len(batch))
    parts = gather_object(parts)
    features = {role: torch.cat([part[role] for part in parts]) for role in parts[0]}
    for role, values in features.items():
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            raise UserError(
                f"{images.name(int(finite.int().argmin()))}: its {role} by `{extractor.name}` are not finite, as of "
                f"{int((~finite).sum())} images in all; see to the weights, "
                f"`evaluate.{'clip_model' if extractor.name == CLIP else 'extractor_weights'}`"
            )
    return features


def _batches(images: ImageSet, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) of these images, the next ones being read while one is worked on."""
    chunks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    shape = images[0].shape
    with ThreadPoolExecutor(READERS) as readers:
        waiting: deque[Future[Tensor]] = deque()
        for chunk in chunks:
            waiting.append(readers.submit(_read, images, chunk, shape))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(images: ImageSet, indices: Sequence[int], shape: torch.Size) -> Tensor:
    batch = [images[index] for index in indices]
    for index, image in zip(indices, batch, strict=True):
        if image.shape != shape:
            raise UserError(
                f"{images.name(index)}: is {_size(image.shape)}, but {images.name(0)} is {_size(shape)}; "
                "metrics need images of one size (a reference is resized by `evaluate.resize`)"
            )
    return torch.stack(batch)


def _size(shape: torch.Size) -> str:
    return f"{shape[2]}×{shape[1]}"
