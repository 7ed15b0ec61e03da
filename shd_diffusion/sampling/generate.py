"""N images by index: what image j is made from, and its noise, follow from (seed, j) alone."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from PIL import Image
from torch import Tensor

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import check_ours, locked, read_as, replacing_file, write_json, write_text
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar
from shd_diffusion.protocol import OF_THE_MODEL, flatten
from shd_diffusion.sample_folder import METADATA, SUMMARY, Summary, image_path, read_summary
from shd_diffusion.sampling.batching import deal_passes
from shd_diffusion.sampling.image_sampler import ImageSampler


def generate_images(
    sampler: ImageSampler,
    config: SampleConfig,
    folder: Path,
    protocol: dict[str, Any],
    name: str,
) -> dict[str, Any]:
    """Write `config.num_images` PNG files, continuing where an interrupted call stopped.

    The files depend neither on interruptions, nor on the number of processes, nor on `config.batch_size`; see
    `deal_passes`.

    Args:
        sampler: makes them.
        folder: gets `000000.png` … and `sampling.json`; with prompts also `metadata.jsonl`.
        protocol: what the images depend on beside `config`, the weights above all; recorded, and compared before files
            are reused.

    Returns:
        The content of `sampling.json`, see `Summary`.

    Raises:
        UserError: the folder holds images of another protocol, or of another origin; or an image is not of numbers.
    """
    protocol = {**protocol, **sampler.settings()}
    _open(folder, protocol, sampler, config)  # before anything is computed
    state = processes()
    with closing(_make_missing(sampler, config, folder, name, state)) as made:
        first = list(islice(made, 1))  # whatever a pipeline refuses, it refuses before there is a folder
        with locked(folder, state):
            return _write(chain(first, made), sampler, config, folder, protocol, state)


class Made(NamedTuple):
    """Images of one pass that the folder lacks, by their index; so many were computed for them, in so many seconds."""

    images: dict[int, Tensor]
    computed: int
    seconds: float


def _make_missing(
    sampler: ImageSampler, config: SampleConfig, folder: Path, name: str, state: PartialState
) -> Generator[Made, None, None]:
    """The images of this process that the folder lacks, pass by pass; nothing is written."""
    sampler.pipeline.set_progress_bar_config(disable=True)
    with progress_bar(config.num_images, f"sample {name}", "image", visible=state.is_main_process) as bar:
        for indices in deal_passes(config, state.process_index, state.num_processes):
            wanted = [index for index in indices if index < config.num_images]
            missing = {index for index in wanted if not image_path(folder, index).exists()}
            if missing:
                began = time.perf_counter()
                try:
                    pixels = sampler.images(indices).cpu()
                except (ValueError, TypeError, IndexError) as error:
                    raise UserError(f"{name}: cannot be sampled ({one_line(error)})") from error
                images = {
                    index: image for index, image in zip(indices, pixels, strict=True) if index in missing
                }
                yield Made(images, len(indices), time.perf_counter() - began)
            bar.update(min(len(wanted) * state.num_processes, config.num_images - bar.n))


def _write(
    made: Iterable[Made],
    sampler: ImageSampler,
    config: SampleConfig,
    folder: Path,
    protocol: dict[str, Any],
    state: PartialState,
) -> dict[str, Any]:
    """All of `generate_images` that writes."""
    summary = _open(folder, protocol, sampler, config) or Summary(**sampler.told(0), protocol=protocol)
    state.wait_for_everyone()  # all have seen the folder as it was
    if state.is_main_process and not summary.num_images:
        write_json(folder / SUMMARY, summary.model_dump())
    state.wait_for_everyone()
    computed, seconds = 0, 0.0
    for each in made:
        computed, seconds = computed + each.computed, seconds + each.seconds
        for index, image in each.images.items():
            _write_png(image_path(folder, index), image)
    state.wait_for_everyone()
    if state.is_main_process and (computed or summary.num_images != config.num_images):
        finished = config.num_images
        summary = Summary(
            num_images=finished,
            **sampler.told(finished),
            seconds_per_image=seconds / computed if computed else summary.seconds_per_image,
            protocol=protocol,
        )
        if lines := sampler.lines(
            finished
        ):  # so that the `datasets` library reads the folder with its prompts
            named = ({"file_name": image_path(folder, j).name, **line} for j, line in enumerate(lines))
            write_text(folder / METADATA, "".join(json.dumps(line) + "\n" for line in named))
        write_json(folder / SUMMARY, summary.model_dump())
    state.wait_for_everyone()
    return read_as(folder / SUMMARY, Summary).model_dump()


def _open(
    folder: Path, protocol: dict[str, Any], sampler: ImageSampler, config: SampleConfig
) -> Summary | None:
    """What is known of the images in the folder, which must have been made under the same protocol.

    Prompts that are the captions of data are as many as images need: where more or fewer are asked for, those of the
    images that are there must be the same.
    """
    summary = read_summary(folder)
    if summary is None:
        check_ours(folder, SUMMARY)
        return None
    there, now = flatten(summary.protocol), flatten(protocol)
    common = min(summary.num_images, config.num_images)
    if config.prompts is None and summary.prompts and common:
        told = sampler.told(common)["prompts"]
        if told == summary.prompts[:common]:
            there.pop("prompts_sha256", None)
            now.pop("prompts_sha256", None)
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) != now.get(key):
            fix = "the model has been trained further; " if key in OF_THE_MODEL else "set it as it was, "
            if key == "prompts_sha256":
                fix = "give the prompts that they were made from, "
            raise UserError(
                f"{folder / SUMMARY}: these samples were made with another `{key}` ({there.get(key)!r}, now "
                f"{now.get(key)!r}); {fix}delete the folder, or sample into another (--output)"
            )
    return summary


def _write_png(path: Path, image: Tensor) -> None:
    with replacing_file(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="png")
