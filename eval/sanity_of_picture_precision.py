"""Launch file: what R-precision against pictures says of real pictures that were spoilt, redrawn or mixed up.

    python eval/sanity_of_picture_precision.py FOLDER --image-size 64 --extractor efficientnet-lite0 --output FILE

FOLDER is one that `datasets.load_dataset` reads, with columns `image`, `caption` and `name`: what a picture shows,
drawn in several styles that only the caption tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sanity_of_metrics import SPOILT

from shd_diffusion.cli import stage
from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data import DataConfig, reference_images
from shd_diffusion.data.hub import load_table
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compute_metrics
from shd_diffusion.evaluation.references import FEWEST_IMAGES
from shd_diffusion.files import write_json

KEYS = ("picture_precision", "picture_precision_low", "picture_precision_high")


def of_other_styles(names: list[str]) -> list[tuple[int, int]]:
    """Pairs of pictures of one name, each with the next of that name, the last with the first."""
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(name, []).append(index)
    groups = [group for group in by_name.values() if len(group) > 1]
    return [pair for group in groups for pair in zip(group, [*group[1:], group[0]], strict=True)]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of some items, evenly spread over them."""
    if count > len(items):
        raise UserError(f"--images {count}: there are {len(items)} to choose from; lower it")
    return [items[place * len(items) // count] for place in range(count)]


@stage
def main(
    data: Annotated[str, typer.Argument(help="A folder of a data set.")],
    extractor: Annotated[str, typer.Option(help="What features are taken from.")],
    image_size: Annotated[int, typer.Option(min=8, help="Width and height of the images.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "test",
    images: Annotated[int, typer.Option(min=FEWEST_IMAGES, help="Images in every row, evenly spread.")] = 200,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """The metric of some of a split's pictures against all of it."""
    config = DataConfig.model_validate(
        {
            "name": "huggingface",
            "path": data,
            "split": split,
            "image_size": image_size,
            "caption_column": "caption",
        }
    )
    real = reference_images(config)
    texts = real.captions()
    names: list[str] = load_table(data, split)["name"][:]
    if texts is None or len(names) != len(real):
        raise UserError(f"{data}: images of split {split} cannot be read, or have no captions; give another")
    pictures, captions = torch.stack([real[i] for i in range(len(real))]), [text[0] for text in texts]
    pairs = spread(of_other_styles(names), images)
    chosen = spread(range(len(real)), images)
    own = [captions[i] for i in chosen]
    rows = {name: (spoil(pictures[chosen]), own) for name, spoil in SPOILT.items()}
    rows["of another style"] = (pictures[[shown for _, shown in pairs]], [captions[i] for i, _ in pairs])
    rows["of another caption"] = (pictures[chosen].roll(images // 2, 0), own)
    settings = EvaluateConfig(
        extractor=extractor, metrics=["picture_precision"], reference=config, batch_size=50
    )
    found: dict[str, Any] = {}
    for name, (samples, prompts) in rows.items():
        metrics = compute_metrics(samples, None, settings, prompts=prompts)
        found[name] = {"images": len(samples)} | {key: metrics[key] for key in KEYS}
        print(f"| {name} | {' | '.join(format(metrics[key], '.1%') for key in KEYS)} |", flush=True)
    if output is not None:
        environment = describe_environment() | {"command": None}  # which would name a folder of this machine
        about = {"data": Path(data).name, "split": split, "extractor": extractor}
        write_json(output, {**about, "figures": found, "environment": environment})


if __name__ == "__main__":
    typer.run(main)
