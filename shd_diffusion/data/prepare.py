"""`prepare`: images through a VAE into a cache of latents, in shards, by as many processes as are launched.

A shard holds a fixed range of the images, so that it is the same whoever writes it. Beside it lies its record
(checksum, counts, what could not be read), written last: a shard with a matching record is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shd_diffusion.config import EncodeConfig, PrepareConfig
from shd_diffusion.data import open_images
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.labelled import LabelledImages
from shd_diffusion.data.latents import MANIFEST, sha256
from shd_diffusion.data.vae import encode_moments, hash_model, load_vae
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json, replacing_file, write_json, write_text
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce, progress_bar

DTYPES = {"float32": torch.float32, "float16": torch.float16}
UNREADABLE = "unreadable.txt"

# What a cache is made from, as its manifest has it, and what to call it in a message.
IDENTITY = {
    "source": "images (by `data`)",
    "num_source_images": "number of images",
    "image_shape": "image size (`data.image_size`)",
    "vae": "VAE (`prepare.vae`)",
    "dtype": "`prepare.dtype`",
    "shard_size": "`prepare.shard_size`",
}


@dataclass(frozen=True)
class Shard:
    """One file of the cache: the images from `start` up to `stop` of the source."""

    folder: Path
    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def path(self) -> Path:
        return self.folder / "shards" / f"latents-{self.number:05d}.safetensors"

    @property
    def record_file(self) -> Path:
        return self.path.with_suffix(".json")

    def read_record(self) -> dict[str, Any]:
        return read_json(self.record_file)

    def is_done(self) -> bool:
        """Whether the shard is there, and as it was written."""
        if not (self.record_file.is_file() and self.path.is_file()):
            return False
        try:
            whole = self.read_record()["sha256"] == sha256(self.path)
        except UserError:
            whole = False
        if not whole:
            announce(f"{self.path}: damaged; it is written anew")
        return whole


def prepare(config: PrepareConfig, output: Path, source: str) -> None:
    """Encode all images of a data set; an interrupted call is continued by the same call.

    Every process of a launch calls this, and takes every so many-th shard.

    Args:
        config: which images, through which VAE.
        output: the folder of the cache.
        source: where the config stands, for messages.

    Raises:
        UserError: the images or the VAE cannot be had, too many images are unreadable, or the folder holds a
            cache of other images, another VAE or another size.
    """
    if config.data.name == "latents":
        raise UserError(
            f"{source}: key `data.name`: latents are what prepare writes; give a data set of images"
        )
    state = processes()
    images = open_images(config.data)
    try:
        vae = load_vae(config.prepare.vae).to(state.device)
    except UserError as error:
        raise UserError(f"{source}: key `prepare.vae`: {error}") from error
    manifest = describe(config, images, vae, source)
    check_identity(output, manifest["identity"])
    shards = plan_shards(output, len(images), config.prepare.shard_size)
    if state.is_main_process:
        for leftover in output.glob("shards/.*.tmp-*"):  # of a call that was killed
            leftover.unlink()
        if not (output / MANIFEST).exists():
            write_json(output / MANIFEST, manifest)
    state.wait_for_everyone()

    encode_shards(shards[state.process_index :: state.num_processes], images, vae, config)
    state.wait_for_everyone()
    records = [shard.read_record() for shard in shards]
    unreadable = [image for record in records for image in record["unreadable"]]
    check_share(unreadable, len(images), config.prepare, output)
    if state.is_main_process:
        write_report(output, unreadable)
        write_json(output / MANIFEST, {**manifest, "shards": records})
        announce(
            f"{output}: {len(images) - len(unreadable)} images in {len(shards)} shards; "
            f"{len(unreadable)} unreadable ones are left out ({UNREADABLE})"
        )
    state.wait_for_everyone()


def describe(config: PrepareConfig, images: LabelledImages, vae: ModelMixin, source: str) -> dict[str, Any]:
    """The manifest of a cache before any shard is written.

    Raises:
        UserError: the VAE does not take images of this shape.
    """
    try:
        probe = encode_moments(vae, as_input(torch.zeros(1, *images.shape, dtype=torch.uint8), vae))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{source}: key `prepare.vae`: {config.prepare.vae} takes no images {images.shape} ({error}); "
            "give another VAE or `data.image_size`"
        ) from None
    return {
        "identity": {
            "source": images.fingerprint(),
            "num_source_images": len(images),
            "image_shape": list(images.shape),
            "vae": hash_model(vae),
            "dtype": config.prepare.dtype,
            "shard_size": config.prepare.shard_size,
        },
        "data": config.data.model_dump(),
        "vae": {
            "path": config.prepare.vae,
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.get("shift_factor") or 0.0,
        },
        "shape": [probe.shape[1] // 2, *probe.shape[2:]],
        "num_classes": images.num_classes,
        "shards": [],
    }


def check_identity(output: Path, identity: dict[str, Any]) -> None:
    """See that the folder is free, or holds a cache of the same images, VAE and size.

    Raises:
        UserError: it does not; what differs is named.
    """
    if not (output / MANIFEST).exists():
        if output.exists() and (
            not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir())
        ):
            raise UserError(f"{output}: holds files but no {MANIFEST} of a cache; give another --output")
        return
    present = read_json(output / MANIFEST).get("identity", {})
    for key, name in IDENTITY.items():
        if present.get(key) != identity[key]:
            raise UserError(
                f"{output / MANIFEST}: this cache was made with another {name} ({present.get(key)} there, "
                f"{identity[key]} now); give another --output or delete the folder"
            )


def plan_shards(output: Path, count: int, size: int) -> list[Shard]:
    """The shards of `count` images, `size` in each but the last."""
    return [
        Shard(output, number, number * size, min((number + 1) * size, count))
        for number in range(math.ceil(count / size))
    ]


def encode_shards(
    shards: list[Shard], images: LabelledImages, vae: ModelMixin, config: PrepareConfig
) -> None:
    """Encode the shards that are not done yet; end as soon as it is certain that too many are unreadable."""
    state = processes()
    name = f"prepare, process {state.process_index + 1} of {state.num_processes}"
    unreadable: list[dict[str, Any]] = []
    with progress_bar(sum(map(len, shards)), name, "image", visible=state.is_main_process) as bar:
        for shard in shards:
            if shard.is_done():
                bar.update(len(shard))
            else:
                encode_shard(shard, images, vae, config, bar.update)
            unreadable += shard.read_record()["unreadable"]
            check_share(unreadable, len(images), config.prepare, shard.folder)


def encode_shard(
    shard: Shard,
    images: LabelledImages,
    vae: ModelMixin,
    config: PrepareConfig,
    advance: Callable[[int], Any],
) -> None:
    """Encode the images of a shard, as they are and mirrored, and write it with its record.

    Raises:
        UserError: it cannot be written.
    """
    settings = config.prepare
    attempts: DataLoader[Any] = DataLoader(
        _Attempts(images, range(shard.start, shard.stop)),
        batch_size=settings.batch_size,
        num_workers=config.data.num_workers,
        collate_fn=list,
    )
    moments: list[Tensor] = []
    labels: list[int] = []
    unreadable: list[dict[str, Any]] = []
    for batch in attempts:
        unreadable += [attempt for attempt in batch if isinstance(attempt, dict)]
        read = [attempt for attempt in batch if isinstance(attempt, tuple)]
        if read:
            pixels = as_input(torch.stack([image for image, _ in read]).to(vae.device), vae)
            both = torch.stack([encode_moments(vae, pixels), encode_moments(vae, pixels.flip(-1))], dim=1)
            moments.append(both.to(DTYPES[settings.dtype]).cpu())
            labels += [label for _, label in read]
        advance(len(batch))
    content = {"labels": torch.tensor(labels, dtype=torch.int64)}
    if moments:
        content["moments"] = torch.cat(moments)
    try:
        with replacing_file(shard.path) as temporary:
            save_file(content, temporary)
            record = {
                "file": str(shard.path.relative_to(shard.folder)),
                "bytes": temporary.stat().st_size,
                "sha256": sha256(temporary),
                "images": len(labels),
                "unreadable": unreadable,
            }
        write_json(shard.record_file, record)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{shard.path}: cannot be written ({error}); make room and run the same command again"
        ) from None


def as_input(images: Tensor, vae: ModelMixin) -> Tensor:
    """8-bit images (B, C, H, W) in [-1, 1], as the VAE sees them: grey ones with three equal channels."""
    scaled = images.float() / 127.5 - 1
    return scaled.expand(-1, vae.config.in_channels, -1, -1) if scaled.shape[1] == 1 else scaled


def write_report(output: Path, unreadable: list[dict[str, Any]]) -> None:
    """Write which images are left out, one a line, and why."""
    write_text(output / UNREADABLE, "".join(f"{image['reason']}\n" for image in unreadable))


def check_share(unreadable: list[dict[str, Any]], count: int, settings: EncodeConfig, output: Path) -> None:
    """See that not too many images are unreadable; those that are so far are reported if there are.

    Raises:
        UserError: there are too many.
    """
    if len(unreadable) > settings.max_corrupt_share * count:
        write_report(output, unreadable)
        raise UserError(
            f"{output}: {len(unreadable)} of {count} images are unreadable, more than the share of "
            f"{settings.max_corrupt_share} that `prepare.max_corrupt_share` allows; "
            f"mend those that {UNREADABLE} names, or raise it"
        )


class _Attempts(Dataset[Any]):
    """Attempts at reading images: the pair that there is, or which one cannot be read, and why."""

    def __init__(self, images: LabelledImages, indices: range) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | dict[str, Any]:
        index = self.indices[position]
        try:
            return self.images[index]
        except UnreadableImage as error:
            return {"index": index, "name": self.images.name(index), "reason": str(error)}
