"""Which real images a few samples resemble most, so that one sees whether a model draws or remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from shd_diffusion.evaluation.images import ImageSet
from shd_diffusion.evaluation.references import Reference
from shd_diffusion.files import replacing_file, write_json

SAMPLES, NEIGHBOURS = 8, 4
CHUNK = 16384  # references whose distances are taken at once


def write_nearest(
    path: Path, samples: ImageSet, features: Tensor, labels: Tensor | None, reference: Reference
) -> None:
    """Write the real images nearest to `SAMPLES` samples: `nearest.json` and a picture of all, `nearest.png`.

    The samples are spread evenly over all. Beside each distance stands what to measure it by, `spacing`: how far
    the nearest real image lies from the next real one. A sample much closer than that is a copy.

    Args:
        path: of the .json; the .png, a row a sample with its neighbours, lies beside it.
        features: of the samples, (N, D).
        labels: the classes asked for, (N,), where they are known.
        reference: without its images only a note is written that says so.
    """
    about = {"reference": reference.source, "num_reference_images": reference.count}
    if reference.images is None or reference.features is None:
        path.with_suffix(".png").unlink(missing_ok=True)
        what = (
            "the reference is a file of statistics without images" if reference.statistics else "no reference"
        )
        write_json(path, {**about, "note": what})
        return
    chosen = torch.linspace(0, len(samples) - 1, min(SAMPLES, len(samples))).round().long()
    distances, neighbours = nearest(features[chosen], reference.features, NEIGHBOURS)
    spacing = nearest(reference.features[neighbours[:, 0]], reference.features, 2)[0][:, -1]

    entries, rows = [], []
    for place, index in enumerate(chosen.tolist()):
        found = neighbours[place].tolist()
        entries.append(
            {
                "index": index,
                "label": _label(labels, index),
                "spacing": float(spacing[place]),
                "nearest": [
                    {
                        "index": number,
                        "name": reference.images.name(number),
                        "label": _label(reference.labels, number),
                        "distance": distance,
                    }
                    for number, distance in zip(found, distances[place].tolist(), strict=True)
                ],
            }
        )
        rows.append([samples[index], *(reference.images[number] for number in found)])
    picture = _picture(rows)
    with replacing_file(path.with_suffix(".png")) as temporary:
        picture.save(temporary, format="png")
    write_json(path, {**about, "samples": entries})


def nearest(queries: Tensor, references: Tensor, count: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The `count` nearest references (R, D) of each query (Q, D): distances, ascending, and indices, (Q, count).

    The references go through chunk by chunk; distances come from differences, exact also where they are near 0.
    """
    distances = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(references), chunk):
        part = references[start : start + chunk]
        here = torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.arange(start, start + len(part)).expand(len(queries), -1)
        candidates = torch.cat([distances, here], dim=1)
        distances, kept = candidates.topk(min(count, candidates.shape[1]), largest=False)
        indices = torch.cat([indices, numbers], dim=1).gather(1, kept)
    return distances, indices


def _label(labels: Tensor | None, index: int) -> Any:
    return None if labels is None else int(labels[index])


def _picture(rows: list[list[Tensor]]) -> Image.Image:
    """Images (3, h, w) as one picture without gaps; those of another size than the first are brought to it."""
    first = to_pil_image(rows[0][0])
    picture = Image.new("RGB", (first.width * len(rows[0]), first.height * len(rows)))
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            # as it is if of that size
            image = to_pil_image(pixels).resize(first.size, Image.Resampling.LANCZOS)
            picture.paste(image, (j * first.width, i * first.height))
    return picture
