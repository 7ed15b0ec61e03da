"""Samples in the folder layouts of text-to-image benchmarks, so that their own scorers run on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_folder
from shd_diffusion.progress import progress_bar
from shd_diffusion.sample_folder import image_path, read_summary
from shd_diffusion.sampling.prompts import Prompt

IN_A_GRID = 4


def write_layout(layout: str, folder: Path, prompts: Sequence[Prompt]) -> Path:
    """Write the samples of a folder into its subfolder `geneval` or `dpg_bench`, the whole of it or nothing.

    Args:
        layout: `geneval` (Ghosh et al. 2023, arXiv 2310.11513) or `dpg_bench` (Hu et al. 2024, arXiv 2403.05135).
        folder: with `sampling.json`; its images j k to j k + k - 1 show prompt j, for the same k.
        prompts: all of them; see `check_layout`.

    Raises:
        UserError: there are no samples, or those of other prompts, or they do not fit into the layout.
    """
    summary = read_summary(folder)
    if summary is None or not summary.num_images:
        raise UserError(f"{folder}: has no finished samples")
    per_prompt = summary.num_images // len(prompts)
    wanted = [prompt.text for prompt in prompts for _ in range(per_prompt)]
    if not wanted or summary.prompts != wanted:
        raise UserError(
            f"{folder}: its {summary.num_images} images are not equally many of each of these {len(prompts)} prompts, "
            "in their order; sample anew, into another folder (--output)"
        )
    check_layout(layout, prompts, per_prompt, str(folder))
    groups = [
        [image_path(folder, index) for index in range(start, start + per_prompt)]
        for start in range(0, len(wanted), per_prompt)
    ]
    with (
        replacing_folder(folder / layout) as temporary,
        progress_bar(len(prompts), f"write {layout}", "prompt") as bar,
    ):
        for number, (prompt, images) in enumerate(zip(prompts, groups, strict=True)):
            _WRITERS[layout](temporary, number, prompt, images)
            bar.update()
        _check_all_ours(folder / layout, temporary)
    return folder / layout


def _check_all_ours(folder: Path, new: Path) -> None:
    """See that a folder holds nothing but what is about to take its place.

    Raises:
        UserError: it does, such as what a scorer has written there.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not (new / path.relative_to(folder)).exists():
            raise UserError(f"{path}: is none of these images, and would be lost; move it elsewhere")


def check_layout(layout: str, prompts: Sequence[Prompt], per_prompt: int, source: str) -> None:
    """See that the scorer of a benchmark can use images of these prompts, before they are sampled.

    Args:
        per_prompt: images of each prompt.
        source: what to name in a message: the file of the prompts.

    Raises:
        UserError: it cannot.
    """
    if layout == "geneval":
        if other := next((prompt for prompt in prompts if "tag" not in prompt.metadata), None):
            raise UserError(
                f"{source}: prompt {other.id} has no key `tag`, which GenEval's scorer needs; give its "
                "evaluation_metadata.jsonl"
            )
        return
    if per_prompt != IN_A_GRID:
        raise UserError(
            f"{source}: DPG-Bench takes {IN_A_GRID} images of each prompt, not {per_prompt}; set "
            f"`sample.images_per_prompt` to {IN_A_GRID}"
        )
    if other := next((prompt for prompt in prompts if "." in prompt.id), None):
        raise UserError(
            f"{source}: the name {other.id} has a dot, where DPG-Bench's scorer cuts it off; rename the file"
        )


def _write_geneval(to: Path, number: int, prompt: Prompt, images: Sequence[Path]) -> None:
    """`00000/metadata.jsonl` with the prompt's line of evaluation_metadata.jsonl, `00000/samples/00000.png` ..."""
    folder = to / f"{number:05d}"
    (folder / "samples").mkdir(parents=True)
    line = json.dumps({**prompt.metadata, "prompt": prompt.text})
    (folder / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    for place, image in enumerate(images):
        shutil.copyfile(image, folder / "samples" / f"{place:05d}.png")


def _write_dpg_bench(to: Path, _number: int, prompt: Prompt, images: Sequence[Path]) -> None:
    """`ID.png`, two by two images row by row; the scorer cuts it into squares."""
    for place, path in enumerate(images):
        with Image.open(path) as image:
            side = image.width
            if image.height != side:
                raise UserError(
                    f"{path}: is {image.width}×{image.height}, but DPG-Bench takes square images; sample such"
                )
            if place == 0:
                grid = Image.new("RGB", (2 * side, 2 * side))
            grid.paste(image, (place % 2 * side, place // 2 * side))
    grid.save(to / f"{prompt.id}.png")


_WRITERS: dict[str, Callable[[Path, int, Prompt, Sequence[Path]], None]] = {
    "geneval": _write_geneval,
    "dpg_bench": _write_dpg_bench,
}
