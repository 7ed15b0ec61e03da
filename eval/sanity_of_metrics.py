"""Launch file: what each metric says of real images that were spoilt in a known way, against other real images.

    python eval/sanity_of_metrics.py digits --extractor digits-classifier --images 70 --reference-images 1000
    python eval/sanity_of_metrics.py FOLDER --image-size 64 --extractor efficientnet-lite0 --output FILE

A metric that can be trusted calls the real ones best. FOLDER is one that `datasets.load_dataset` reads, with columns
`image` and `label`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from shd_diffusion.cli import stage
from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data import DataConfig, reference_images
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compute_metrics
from shd_diffusion.evaluation.metrics import METRICS
from shd_diffusion.evaluation.references import FEWEST_IMAGES
from shd_diffusion.files import write_json

BLUR, QUALITY, NOISE = (
    1.0,
    10,
    25.0,
)  # standard deviation in pixels; of JPEG; standard deviation of 8-bit values
METRICS_SHOWN = ("fid", "kid", "mind", "is", "prc", "dc")


def add_noise(images: Tensor) -> Tensor:
    """8-bit images with Gaussian noise on them, the same at every call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + NOISE * noise).round().clamp(0, 255).to(torch.uint8)


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda images: images,
    f"blurred, {BLUR:g} px": lambda images: transforms.gaussian_blur(images, [7, 7], [BLUR, BLUR]),
    f"JPEG, quality {QUALITY}": lambda images: torch.stack(
        [transforms.jpeg(image, QUALITY) for image in images]
    ),
    f"noisy, {NOISE:g} of 255": add_noise,
}
ONE_CLASS = "of one class"


def split(labels: Tensor, images: int, reference_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the reference, of other real images, and of others of the first class; classes in equal parts.

    Raises:
        UserError: a class has too few images.
    """
    by_class = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    of_reference, of_others = reference_images // len(by_class), images // len(by_class)
    fewest, first = min(map(len, by_class)), len(by_class[0])
    if min(of_reference, of_others) < 1 or min(fewest - of_others, first - images) < of_reference:
        raise UserError(
            f"--images, --reference-images: {images} and {reference_images} of {len(by_class)} classes with "
            f"{fewest} images or more; the first class, of {first}, gives the reference its share and all of --images"
        )
    reference = torch.cat([own[:of_reference] for own in by_class])
    others = torch.cat([own[of_reference : of_reference + of_others] for own in by_class])
    return reference, others, by_class[0][of_reference : of_reference + len(others)]


@stage
def main(
    data: Annotated[str, typer.Argument(help="`digits`, or a folder of a data set.")],
    extractor: Annotated[list[str], typer.Option(help="Extractors, once for each.")],
    images: Annotated[int, typer.Option(min=FEWEST_IMAGES, help="Images in every row of the table.")] = 300,
    reference: Annotated[
        int, typer.Option("--reference-images", min=FEWEST_IMAGES, help="Real images they are compared with.")
    ] = 2000,
    image_size: Annotated[int | None, typer.Option(min=8, help="Width and height of the images.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Every metric of real images, spoilt and not, by each extractor."""
    config = DataConfig(name="digits")
    if data != "digits":
        config = DataConfig(name="huggingface", path=data, split="train", image_size=image_size)
    real = reference_images(config)
    if real.labels is None:
        raise UserError(f"{data}: has no labels; give a data set with classes")
    parts = split(real.labels, images, reference)
    compared, others, of_one_class = (torch.stack([real[int(i)] for i in part]) for part in parts)
    rows = {name: spoil(others) for name, spoil in SPOILT.items()} | {ONE_CLASS: of_one_class}
    tables: dict[str, dict[str, Any]] = {}
    for name in extractor:
        settings = EvaluateConfig(extractor=name, metrics=list(METRICS_SHOWN), batch_size=50)
        tables[name] = {row: compute_metrics(shown, compared, settings) for row, shown in rows.items()}
        print_table(name, tables[name])
    if output is not None:
        columns = [column.key for name in METRICS_SHOWN for column in METRICS[name].columns]
        figures = {
            name: {row: {key: found[key] for key in columns} for row, found in table.items()}
            for name, table in tables.items()
        }
        counts = {"images": len(others), "reference_images": len(compared)}
        environment = describe_environment() | {"command": None}  # which would name a folder of this machine
        write_json(
            output, {"data": Path(data).name, **counts, "figures": figures, "environment": environment}
        )


def print_table(extractor: str, table: dict[str, dict[str, Any]]) -> None:
    """In Markdown: a row a set of images, a column a metric."""
    columns = [column for name in METRICS_SHOWN for column in METRICS[name].columns]
    print("|".join(["", extractor, *(column.title for column in columns), ""]))
    print("|".join(["", *["---"] * (len(columns) + 1), ""]))
    for row, found in table.items():
        print("|".join(["", row, *(format(found[c.key], c.format or ".3g") for c in columns), ""]))


if __name__ == "__main__":
    typer.run(main)
