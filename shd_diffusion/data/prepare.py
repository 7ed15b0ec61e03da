"""`prepare`: images through a VAE into a cache of latents, in shards, by as many processes as are launched; their
captions, where they have some, through the text encoders of a text-to-image pipeline.

A shard holds a fixed range of the images, so that it is the same whoever writes it. Beside it lies its record
(checksum, counts, what could not be read), written last: a shard with a matching record is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shd_diffusion.data.datasets import DataConfig, open_dataset
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.images import from_bytes, to_rgb
from shd_diffusion.data.latent_space import LatentSpace, load_vae
from shd_diffusion.data.latents import MANIFEST, checksum, read_manifest
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import holds_files, read_json, save_tensors, sha256, write_json, write_text
from shd_diffusion.hashing import hash_model
from shd_diffusion.models.denoiser import NOT_DROPPED, pad
from shd_diffusion.models.pipeline_folder import find_pipeline
from shd_diffusion.models.prompts import PromptEncoder, load_for_prompts
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce, progress_bar
from shd_diffusion.section import Section

DTYPES = {"float32": torch.float32, "float16": torch.float16}
UNREADABLE, NULL = "unreadable.txt", "null.safetensors"

# What a cache is made from, as its manifest has it, and what to call it in a message.
IDENTITY = {
    "source": "images (by `data`)",
    "num_source_images": "number of images",
    "image_shape": "image size (`data.image_size`)",
    "vae": "VAE (`prepare.vae`)",
    "prompts": "text encoder, tokenizer or caption length (the pipeline's)",
    "dtype": "`prepare.dtype`",
    "shard_size": "`prepare.shard_size`",
}


class EncodeConfig(Section):
    """How `prepare` encodes images into a cache of latents, and their captions.

    Without a `vae` it is that of the pipeline. `prompt_dtype` is that of the text encoders and of what they give;
    `prompt_arguments` are given to the pipeline's call as they are, such as `max_sequence_length`.
    `max_corrupt_share`: of the images that may be unreadable and left out, before that is an error.
    """

    output: str | None = None
    vae: str | None = None
    batch_size: int = Field(16, ge=1)
    shard_size: int = Field(4096, ge=1)
    dtype: Literal["float32", "float16"] = "float32"
    prompt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    prompt_arguments: dict[str, Any] = Field(default_factory=dict)
    max_corrupt_share: float = Field(0.001, ge=0, le=1)


class PrepareConfig(Section):
    """`prepare`: a cache of latents from images, and of embeddings from their captions by a `pipeline`."""

    output: str | None = None
    data: DataConfig
    prepare: EncodeConfig
    pipeline: str | None = None


@dataclass(frozen=True)
class Shard:
    """One file of the cache: the images from `start` up to `stop` of the source.

    `identity` stands for all that it follows from.
    """

    folder: Path
    number: int
    start: int
    stop: int
    identity: str

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
            record = self.read_record()
            whole = record["identity"] == self.identity and record["sha256"] == sha256(self.path)
        except (UserError, KeyError, TypeError):
            whole = False
        if not whole:
            announce(f"{self.path}: damaged, or of another cache; it is written anew")
        return whole


def prepare(config: PrepareConfig, output: Path, source: str) -> None:
    """Encode all images of a data set; an interrupted call is continued by the same call.

    Every process of a launch calls this, and takes every so many-th shard.

    Raises:
        UserError: the images or the VAE cannot be had, too many images are unreadable, or the folder holds a
            cache of other images, another VAE or another size.
    """
    if config.data.name == "latents":
        raise UserError(
            f"{source}: key `data.name`: latents are what prepare writes; give a data set of images"
        )
    state = processes()
    images = open_dataset(config.data)
    encoder = open_encoder(config, images, source)
    vae = config.prepare.vae or config.pipeline
    if vae is None:
        raise UserError(
            f"{source}: key `prepare.vae` is missing; add it, or `pipeline`, whose VAE it then is"
        )
    try:
        space = LatentSpace(load_vae(vae).to(state.device))
    except UserError as error:
        raise UserError(f"{source}: key `prepare.vae`: {error}") from error
    manifest = describe(config, images, space, encoder, source)
    check_identity(output, manifest["identity"])
    shards = plan_shards(output, len(images), config.prepare.shard_size, checksum(manifest["identity"]))
    state.wait_for_everyone()  # until all have looked at the folder
    if state.is_main_process:
        for leftover in output.glob("shards/.*tmp*"):  # of a call that was killed
            leftover.unlink()
        if null := encoder.null:
            save_tensors(null, output / NULL)
        if not (output / MANIFEST).exists():
            write_manifest(output, manifest)
    state.wait_for_everyone()

    encode_shards(shards[state.process_index :: state.num_processes], images, space, encoder, config)
    state.wait_for_everyone()
    records = [shard.read_record() for shard in shards]
    unreadable = [image for record in records for image in record["unreadable"]]
    check_share(unreadable, len(images), config.prepare, output)
    if state.is_main_process:
        write_report(output, unreadable)
        write_manifest(output, {**manifest, "shards": records})
        announce(
            f"{output}: {len(images) - len(unreadable)} images in {len(shards)} shards; "
            f"{len(unreadable)} unreadable ones are left out ({UNREADABLE})"
        )
    state.wait_for_everyone()


class ConditionEncoder:
    """What the model is told of images: their labels, or their captions by a pipeline's text encoders.

    Attributes:
        identity: of what the captions are encoded by; None without captions.
        null: what stands for no condition, (1, ...) by argument, as far as it is known here.
    """

    def __init__(
        self, images: Images, prompts: PromptEncoder | None, identity: dict[str, Any] | None
    ) -> None:
        self.images, self.prompts, self.identity = images, prompts, identity
        null = images.null if prompts is None else pad([prompts.null()])
        self.null = {name: value for name, value in null.items() if name not in NOT_DROPPED}

    def counts(self, indices: list[int]) -> list[int]:
        """How many conditions each image has."""
        return [1 if self.prompts is None else len(self.images.captions(index)) for index in indices]

    def encode(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """The conditions of images, one after the other.

        Raises:
            UserError: an image has no caption, or embeddings are not finite.
        """
        if self.prompts is None:
            return [self.images.condition(index) for index in indices]
        captions = [caption for index in indices for caption in self.images.captions(index)]
        found = self.prompts.encode(captions)
        for caption, condition in zip(captions, found, strict=True):
            if not all(value.isfinite().all() for value in condition.values()):
                raise UserError(
                    f"the embedding of {caption!r} is not finite; set `prepare.prompt_dtype` to float32"
                )
        return found


def open_encoder(config: PrepareConfig, images: Images, source: str) -> ConditionEncoder:
    """What encodes the conditions of a data set.

    Raises:
        UserError: there are captions but no pipeline that takes prompts, or the reverse.
    """
    pipeline = None if config.pipeline is None else find_pipeline(config.pipeline)
    takes_prompts = pipeline is not None and pipeline.takes_prompts
    if not takes_prompts:
        if config.data.caption_column is not None:
            raise UserError(
                f"{source}: key `data.caption_column`: captions are for a text-to-image pipeline, which "
                f"{config.pipeline or 'nothing here'} is not; remove it"
            )
        return ConditionEncoder(images, None, None)
    assert pipeline is not None
    if not images.captions(0):
        raise UserError(
            f"{source}: key `data.caption_column` is missing: {pipeline.name} makes images from prompts; "
            "name where the captions are"
        )
    settings = config.prepare
    dtype: torch.dtype = getattr(torch, settings.prompt_dtype)
    loaded = load_for_prompts(pipeline.name, dtype, processes().device)
    _, height, width = images.shape
    try:
        prompts = PromptEncoder(loaded, (height, width), settings.prompt_arguments)
        prompts.encode(images.captions(0)[:1])
    except (TypeError, ValueError) as error:  # pipelines refuse sizes and arguments as they like
        raise UserError(
            f"{source}: key `prepare.prompt_arguments`: {pipeline.name} takes no prompts so ({one_line(error)})"
        ) from error
    identity = {
        "encoders": pipeline.hash_prompt_parts(),
        "dtype": settings.prompt_dtype,
        "arguments": settings.prompt_arguments,
    }
    return ConditionEncoder(images, prompts, identity)


def describe(
    config: PrepareConfig, images: Images, space: LatentSpace, encoder: ConditionEncoder, source: str
) -> dict[str, Any]:
    """The manifest of a cache before any shard is written.

    Raises:
        UserError: the VAE does not take images of this shape, or the pipeline no such captions.
    """
    vae = config.prepare.vae or config.pipeline
    try:
        parts = space.parts(as_input(torch.zeros(1, *images.shape, dtype=torch.uint8).to(space.vae.device)))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{source}: key `prepare.vae`: {vae} takes no images {images.shape} ({one_line(error)}); "
            "give another VAE or `data.image_size`"
        ) from None
    return {
        "identity": {
            "source": images.fingerprint(),
            "num_source_images": len(images),
            "image_shape": list(images.shape),
            "vae": hash_model(space.vae),  # with its scaling
            **({} if encoder.identity is None else {"prompts": encoder.identity}),
            "dtype": config.prepare.dtype,
            "shard_size": config.prepare.shard_size,
        },
        "data": config.data.model_dump(),
        "vae": {"path": vae, "scaling": asdict(space.scaling)},
        "shape": list(parts[0].shape[1:]),
        "has_variance": len(parts) == 2,
        "conditions": sorted(encoder.encode([0])[0]),
        "num_classes": images.num_classes,
        "class_names": images.class_names,
        "null": NULL if encoder.null else None,
        "shards": [],
    }


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its checksum."""
    write_json(output / MANIFEST, {**manifest, "checksum": checksum(manifest)})


def check_identity(output: Path, identity: dict[str, Any]) -> None:
    """See that the folder is free, or holds a cache of the same images, VAE and size.

    Raises:
        UserError: it does not; what differs is named.
    """
    if not (output / MANIFEST).exists():
        if not (output / "shards").is_dir() and holds_files(output):
            raise UserError(f"{output}: holds files but no {MANIFEST} of a cache; give another --output")
        return
    present = read_manifest(output, complete=False)["identity"]
    for key, name in IDENTITY.items():
        if present.get(key) != identity.get(key):
            raise UserError(
                f"{output / MANIFEST}: this cache was made with another {name} ({present.get(key)} there, "
                f"{identity.get(key)} now); give another --output or delete the folder"
            )


def plan_shards(output: Path, count: int, size: int, identity: str) -> list[Shard]:
    """The shards of `count` images, `size` in each but the last."""
    return [
        Shard(output, number, number * size, min((number + 1) * size, count), identity)
        for number in range(math.ceil(count / size))
    ]


def encode_shards(
    shards: list[Shard], images: Images, space: LatentSpace, encoder: ConditionEncoder, config: PrepareConfig
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
                encode_shard(shard, images, space, encoder, config, bar.update)
            unreadable += shard.read_record()["unreadable"]
            check_share(unreadable, len(images), config.prepare, shard.folder)


def encode_shard(
    shard: Shard,
    images: Images,
    space: LatentSpace,
    encoder: ConditionEncoder,
    config: PrepareConfig,
    advance: Callable[[int], Any],
) -> None:
    """Encode the images of a shard, as they are and mirrored, and write it with its record.

    Raises:
        UserError: latents are not finite, or the shard cannot be written.
    """
    settings = config.prepare
    attempts: DataLoader[Any] = DataLoader(
        _Attempts(images, range(shard.start, shard.stop)),
        batch_size=settings.batch_size,
        num_workers=config.data.num_workers,
        collate_fn=list,
    )
    moments: list[Tensor] = []
    conditions: list[dict[str, Tensor]] = []
    counts: list[int] = []
    unreadable: list[dict[str, Any]] = []
    for batch in attempts:
        unreadable += [attempt for attempt in batch if "reason" in attempt]
        if read := [attempt for attempt in batch if "image" in attempt]:
            indices = [attempt["index"] for attempt in read]
            pixels = as_input(torch.stack([attempt["image"] for attempt in read]).to(space.vae.device))
            both = torch.stack([space.encode(pixels), space.encode(pixels.flip(-1))], dim=1)
            moments.append(both.to(DTYPES[settings.dtype]).cpu())
            for row in (~moments[-1].flatten(1).isfinite().all(dim=1)).nonzero():
                raise UserError(
                    f"{images.name(indices[int(row)])}: its latents are not finite in {settings.dtype}; "
                    "remove the image, or set `prepare.dtype` to float32"
                )
            conditions += encoder.encode(indices)
            counts += encoder.counts(indices)
        advance(len(batch))
    content = {"moments": torch.cat(moments), **pad(conditions)} if moments else {}
    if encoder.identity is not None:
        content["captions"] = torch.tensor([0, *counts]).cumsum(0)
    try:
        save_tensors(content, shard.path)
        record = {
            "file": str(shard.path.relative_to(shard.folder)),
            "bytes": shard.path.stat().st_size,
            "sha256": sha256(shard.path),
            "images": len(shard) - len(unreadable),
            "unreadable": unreadable,
            "identity": shard.identity,
        }
        write_json(shard.record_file, record)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{shard.path}: cannot be written ({error}); make room and run the same command again"
        ) from None


def as_input(images: Tensor) -> Tensor:
    """8-bit images (B, C, H, W) as a VAE sees them: RGB in [-1, 1]."""
    return to_rgb(from_bytes(images))


def write_report(output: Path, unreadable: list[dict[str, Any]]) -> None:
    """Write which images are left out, one a line, and why."""
    write_text(output / UNREADABLE, "".join(f"{image['reason']}\n" for image in unreadable))


def check_share(unreadable: list[dict[str, Any]], count: int, settings: EncodeConfig, output: Path) -> None:
    """See that not too many images are unreadable; those that are so far are reported if there are.

    Raises:
        UserError: there are too many.
    """
    if len(unreadable) > settings.max_corrupt_share * count or len(unreadable) == count:
        write_report(output, unreadable)
        raise UserError(
            f"{output}: {len(unreadable)} of {count} images are unreadable, more than the share of "
            f"{settings.max_corrupt_share} that `prepare.max_corrupt_share` allows; "
            f"fix those that {UNREADABLE} names, or raise it"
        )


class _Attempts(Dataset[dict[str, Any]]):
    """Attempts at reading images: items with their index, or which image cannot be read, and why."""

    def __init__(self, images: Images, indices: range) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        try:
            return {"image": self.images.image(index), "index": index}
        except UnreadableImage as error:
            return {"index": index, "name": self.images.name(index), "reason": str(error)}
