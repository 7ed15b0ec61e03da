"""`prepare`: images through a VAE into a cache of latents, in shards, by as many processes as are launched; their
captions, where they have some, through the text encoders of a text-to-image pipeline.

A shard holds a fixed range of the images, so that it is the same whoever writes it. Beside it lies its record
(checksum, counts, what could not be read), written last: a shard with a matching record is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shd_diffusion.data.cache_shards import Shard, plan_shards
from shd_diffusion.data.conditions import CaptionEncoder, LabelEncoder
from shd_diffusion.data.datasets import DataConfig, name_of, open_dataset
from shd_diffusion.data.decoding import SmallImage, UnreadableImage, UnreadFile
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.images import from_bytes, to_rgb
from shd_diffusion.data.latent_space import LatentSpace, load_vae
from shd_diffusion.data.latents import MANIFEST, checksum, read_manifest
from shd_diffusion.data.prompts import Prompts
from shd_diffusion.data.sampled_latents import LatentSampler, TeacherSamplingConfig
from shd_diffusion.data.tell import announce_images
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import (
    check_ours,
    check_outside,
    locked,
    save_tensors,
    sha256,
    write_json,
    write_text,
)
from shd_diffusion.hashing import hash_model
from shd_diffusion.models.denoiser import pad
from shd_diffusion.models.pipeline_folder import find_pipeline
from shd_diffusion.models.prompts import denoiser_name, load_for_prompts
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce, progress_bar
from shd_diffusion.section import MOST_AT_ONCE, Arguments, Section

DTYPES = {"float32": torch.float32, "float16": torch.float16}
UNREADABLE, NULL = "unreadable.txt", "null.safetensors"

# What a cache is made from, as its manifest has it, and what to call it in a message.
IDENTITY = {
    "source": "images (by `data`)",
    "num_source_images": "number of images",
    "image_shape": "image size (`data.image_size`)",
    "vae": "VAE (`prepare.vae`)",
    "prompts": "text encoder, tokenizer or caption length (the pipeline's)",
    "sampling": "`prepare.teacher_sampling`",
    "dtype": "`prepare.dtype`",
    "shard_size": "`prepare.shard_size`",
}


class EncodeConfig(Section):
    """How `prepare` encodes images into a cache of latents, and their captions.

    Without a `vae` it is that of the pipeline. `prompt_dtype` is that of the text encoders and of what they give;
    `prompt_arguments` are given to the pipeline's call as they are, such as `max_sequence_length`.
    `max_corrupt_share`: of the images that may be unreadable and left out, before that is an error.
    `teacher_sampling`: how the teacher samples the latents of a data set of prompts, which has no images.
    """

    output: str | None = None
    vae: str | None = None
    batch_size: int = Field(16, ge=1, le=MOST_AT_ONCE)
    shard_size: int = Field(4096, ge=1, le=MOST_AT_ONCE)
    dtype: Literal["float32", "float16"] = "float32"
    prompt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    prompt_arguments: Arguments = Field(default_factory=dict)
    max_corrupt_share: float = Field(0.001, ge=0, le=1)
    teacher_sampling: TeacherSamplingConfig = TeacherSamplingConfig()


class PrepareConfig(Section):
    """`prepare`: a cache of latents from images, and of embeddings from their captions by a `pipeline`."""

    output: str | None = None
    data: DataConfig
    prepare: EncodeConfig
    pipeline: str | None = None


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
    check_outside(
        output,
        {"data.path": config.data.path, "prepare.vae": config.prepare.vae, "pipeline": config.pipeline},
    )
    images = open_dataset(config.data)
    announce_images(images, name_of(config.data))
    encoder = open_encoder(config, images, source)
    space = open_space(config, source)
    manifest = describe(config, images, space, encoder, source)
    if isinstance(encoder, CaptionEncoder):  # training would refuse it too, after hours of encoding
        try:
            encoder.check(manifest["shape"])
        except (UserError, ValueError) as error:
            raise UserError(f"{source}: {config.pipeline} cannot be trained here: {error}") from error
    check_identity(output, manifest["identity"])
    finished = finished_shards(output)
    shards = plan_shards(output, images, config.prepare.shard_size, checksum(manifest["identity"]), finished)
    state.wait_for_everyone()  # until all have looked at the folder
    with locked(output, state):
        check_identity(output, manifest["identity"])  # again, as another command may have been here meanwhile
        _prepare(config, output, source, images, encoder, space, manifest, shards, bool(finished))


def _prepare(
    config: PrepareConfig,
    output: Path,
    source: str,
    images: Images,
    encoder: LabelEncoder | CaptionEncoder,
    space: LatentSpace,
    manifest: dict[str, Any],
    shards: list[Shard],
    finished: bool,
) -> None:
    """All of `prepare` that writes."""
    state = processes()
    state.wait_for_everyone()
    if state.is_main_process:
        if null := encoder.null:
            if not _has_null(output):
                save_tensors(null, output / NULL)
            manifest["null_sha256"] = sha256(output / NULL)
        if not (output / MANIFEST).exists():
            write_manifest(output, manifest)
    state.wait_for_everyone()

    if isinstance(images, Prompts):
        assert isinstance(encoder, CaptionEncoder)
        latents = teacher_latents(config, images, space, manifest["shape"], source, encoder.pipeline)
    else:
        latents = partial(encode_images, images, space, config)
    mine = shards[state.process_index :: state.num_processes]
    encode_shards(mine, images, encoder, latents, config, finished)
    if not finished and (lacking := [shard for shard in mine if _can_be_read_by_now(images, shard)]):
        encode_shards(lacking, images, encoder, latents, config, finished)
    state.wait_for_everyone()
    records = [shard.read_record() for shard in shards]
    unreadable = [image for record in records for image in record["unreadable"]]
    check_share(unreadable, len(images), config.prepare, output)
    if state.is_main_process:
        write_report(output, unreadable)
        write_manifest(output, {**manifest, "shards": records})
        left_out = f"; {len(unreadable):,} unreadable ones are left out ({UNREADABLE})" if unreadable else ""
        announce(f"{output}: {len(images) - len(unreadable):,} images{left_out}")
    state.wait_for_everyone()


def open_space(config: PrepareConfig, source: str) -> LatentSpace:
    """The latent space of the VAE that a config names, or of its pipeline's.

    Raises:
        UserError: there is none.
    """
    vae = config.prepare.vae or config.pipeline
    if vae is None:
        raise UserError(
            f"{source}: key `prepare.vae` is missing; add it, or `pipeline`, whose VAE it then is"
        )
    try:
        return LatentSpace(load_vae(vae).to(processes().device))
    except UserError as error:
        raise UserError(f"{source}: key `prepare.vae`: {error}") from error


def open_encoder(config: PrepareConfig, images: Images, source: str) -> LabelEncoder | CaptionEncoder:
    """What encodes the conditions of a data set.

    Raises:
        UserError: there are captions but no pipeline that takes prompts, or the reverse.
    """
    pipeline = None if config.pipeline is None else find_pipeline(config.pipeline)
    if pipeline is None or not pipeline.takes_prompts:
        if config.data.caption_column is not None or isinstance(images, Prompts):
            if config.pipeline is not None and pipeline is None:
                raise UserError(
                    f"{source}: key `teacher.path` or `pipeline`: {config.pipeline} holds no pipeline, which is a "
                    "model_index.json beside its denoiser's folder; give the folder or the hub name of one"
                )
            named = config.pipeline or "nothing here"
            raise UserError(
                f"{source}: key `data.caption_column`: captions are for a text-to-image pipeline, and {named} is none; "
                "name one, or remove the key"
            )
        return LabelEncoder(images)
    if not images.captions(0):
        raise UserError(
            f"{source}: key `data.caption_column` is missing: {pipeline.name} makes images from prompts; "
            "name where the captions are"
        )
    settings = config.prepare
    dtype: torch.dtype = getattr(torch, settings.prompt_dtype)
    loaded = load_for_prompts(pipeline.name, dtype, processes().device)
    identity = {
        "encoders": pipeline.hash_prompt_parts(),
        "dtype": settings.prompt_dtype,
        "arguments": settings.prompt_arguments,
    }
    first_only = isinstance(images, Prompts)
    try:
        return CaptionEncoder(images, loaded, settings.prompt_arguments, identity, first_only)
    except (UserError, TypeError, ValueError) as error:  # pipelines refuse sizes and arguments as they like
        raise UserError(
            f"{source}: key `prepare.prompt_arguments`: {pipeline.name} takes no prompts so ({one_line(error)})"
        ) from error


def describe(
    config: PrepareConfig,
    images: Images,
    space: LatentSpace,
    encoder: LabelEncoder | CaptionEncoder,
    source: str,
) -> dict[str, Any]:
    """The manifest of a cache before any shard is written.

    Raises:
        UserError: the VAE does not take images of this shape, or the pipeline no such captions.
    """
    vae, settings = config.prepare.vae or config.pipeline, config.prepare
    sampled = isinstance(images, Prompts)
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
            **({"sampling": settings.teacher_sampling.model_dump()} if sampled else {}),
            "dtype": settings.dtype,
            "shard_size": settings.shard_size,
        },
        "data": config.data.model_dump(),
        "vae": {"path": vae, "scaling": asdict(space.scaling)},
        "shape": list(parts[0].shape[1:]),
        "has_variance": len(parts) == 2 and not sampled,
        "conditions": sorted(encoder.encode([0])[0][0]),
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
    check_ours(output, MANIFEST, "shards")
    if not (output / MANIFEST).exists():
        return
    present = read_manifest(output, complete=False)["identity"]
    for key, name in IDENTITY.items():
        if present.get(key) != identity.get(key):
            raise UserError(
                f"{output / MANIFEST}: this cache was made with another {name} ({present.get(key)} there, "
                f"{identity.get(key)} now); give another --output or delete the folder"
            )


def finished_shards(output: Path) -> list[dict[str, Any]]:
    """The records of the shards of a cache that is complete; none of one that is not."""
    return read_manifest(output, complete=False)["shards"] if (output / MANIFEST).exists() else []


def _has_null(output: Path) -> bool:
    """Whether a cache has its condition for none: it stays, since another machine's differs in rounding, and the cache
    would be another one."""
    if not ((output / MANIFEST).exists() and (output / NULL).exists()):
        return False
    return read_manifest(output, complete=False).get("null_sha256") == sha256(output / NULL)


Latents = Callable[[Shard], Iterator[tuple[Tensor, list[Any]]]]
"""From a shard to batches of moments (b, copies, k·C, h, w), with B attempts, of which b are no failure."""


def encode_shards(
    shards: list[Shard],
    images: Images,
    encoder: LabelEncoder | CaptionEncoder,
    latents: Latents,
    config: PrepareConfig,
    finished: bool,
) -> None:
    """Encode the shards that are not done yet; end as soon as it is certain that too many are unreadable.

    Args:
        finished: the cache was complete, so runs know it as it is: what it lacks it lacks for good.
    """
    state = processes()
    name = f"prepare, process {state.process_index + 1} of {state.num_processes}"
    unreadable: list[dict[str, Any]] = []
    with progress_bar(sum(map(len, shards)), name, "image", visible=state.is_main_process) as bar:
        for shard in shards:
            if shard.is_done() and (finished or not _can_be_read_by_now(images, shard)):
                bar.update(len(shard))
            else:
                encode_shard(shard, images, encoder, latents, config, bar.update)
            unreadable += shard.read_record()["unreadable"]
            check_share(unreadable, len(images), config.prepare, shard.folder)


def encode_shard(
    shard: Shard,
    images: Images,
    encoder: LabelEncoder | CaptionEncoder,
    latents: Latents,
    config: PrepareConfig,
    advance: Callable[[int], Any],
) -> None:
    """Encode the images of a shard, and write it with its record.

    Raises:
        UserError: latents are not finite, or the shard cannot be written.
    """
    moments: list[Tensor] = []
    conditions: list[list[dict[str, Tensor]]] = []
    unreadable: list[dict[str, Any]] = []
    for batch, attempts in latents(shard):
        unreadable += [attempt for attempt in attempts if "reason" in attempt]
        read = [attempt["index"] for attempt in attempts if "reason" not in attempt]
        if read:
            moments.append(batch.to(DTYPES[config.prepare.dtype]).cpu())
            for row in (~moments[-1].flatten(1).isfinite().all(dim=1)).nonzero():
                raise UserError(
                    f"{images.name(read[int(row)])}: its latents are not finite in {config.prepare.dtype}; "
                    "remove it, or set `prepare.dtype` to float32"
                )
            conditions += encoder.encode(read)
        advance(len(attempts))
    content: dict[str, Tensor] = {}
    if moments:
        content = {"moments": torch.cat(moments), **pad([each for image in conditions for each in image])}
        if encoder.identity is not None:
            content["captions"] = torch.tensor([0, *map(len, conditions)]).cumsum(0)
    try:
        save_tensors(content, shard.path)
        record = {
            "file": str(shard.path.relative_to(shard.folder)),
            "bytes": shard.path.stat().st_size,
            "sha256": sha256(shard.path),
            "images": len(shard) - len(unreadable),
            "size": list(content["moments"].shape[3:]) if moments else [],
            "unreadable": unreadable,
            "identity": shard.identity,
        }
        write_json(shard.record_file, record)
    except OSError as error:
        raise UserError(
            f"{shard.path}: cannot be written ({error}); make room and run the same command again"
        ) from None


def encode_images(
    images: Images, space: LatentSpace, config: PrepareConfig, shard: Shard
) -> Iterator[tuple[Tensor, list[Any]]]:
    """The moments of images, as they are and mirrored, (b, 2, k·C, h, w); see `Latents`."""
    attempts: DataLoader[Any] = DataLoader(
        _Attempts(images, shard),
        batch_size=config.prepare.batch_size,
        num_workers=config.data.num_workers,
        collate_fn=list,
    )
    for batch in attempts:
        read = [attempt.pop("image") for attempt in batch if "image" in attempt]
        if not read:
            yield torch.empty(0), batch
            continue
        pixels = as_input(torch.stack(read).to(space.vae.device))
        yield torch.stack([space.encode(pixels), space.encode(pixels.flip(-1))], dim=1), batch


def teacher_latents(
    config: PrepareConfig,
    images: Images,
    space: LatentSpace,
    shape: list[int],
    source: str,
    opened: DiffusionPipeline,
) -> Latents:
    """What lets the teacher sample the latents of prompts, (b, 1, C, h, w); see `Latents`.

    Args:
        opened: its pipeline without its denoiser's weights, see `load_for_prompts`; all others are used as they are.

    Raises:
        UserError: the teacher cannot be loaded, or takes no such arguments.
    """
    settings, name = config.prepare, str(config.pipeline)
    dtype: torch.dtype = getattr(torch, settings.prompt_dtype)
    try:
        parts = {part: model for part, model in opened.components.items() if isinstance(model, nn.Module)}
        del parts[denoiser_name(opened)]
        pipeline = type(opened).from_pretrained(name, dtype=dtype, **parts).to(processes().device)
        sampler = LatentSampler(
            pipeline, space, images.shape[1:], shape, settings.teacher_sampling, settings.prompt_arguments
        )
    except Exception as error:  # diffusers raises errors of any kind
        raise UserError(f"{source}: {name} cannot sample latents ({one_line(error)})") from error

    def sample(shard: Shard) -> Iterator[tuple[Tensor, list[Any]]]:
        for start in range(0, len(shard), settings.batch_size):
            batch = shard.indices[start : start + settings.batch_size]
            latents = sampler.sample(batch, [images.captions(index)[0] for index in batch])
            yield latents[:, None], [{"index": index} for index in batch]

    return sample


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
    corrupt = sum(not image.get("small") for image in unreadable)  # small ones are left out by intention
    if corrupt > settings.max_corrupt_share * count or len(unreadable) == count:
        write_report(output, unreadable)
        raise UserError(
            f"{output}: {len(unreadable)} of {count} images are unreadable, more than the share of "
            f"{settings.max_corrupt_share} that `prepare.max_corrupt_share` allows; "
            f"fix those that {UNREADABLE} names, or raise it"
        )


class _Attempts(Dataset[dict[str, Any]]):
    """Attempts at reading the images of a shard: items with their index, or which image cannot be read, and why."""

    def __init__(self, images: Images, shard: Shard) -> None:
        self.images, self.shard = images, shard

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.shard.indices[position]
        try:
            image = self.images.image(index)
            if tuple(image.shape[1:]) != self.shard.size:
                raise UnreadFile(f"{self.images.name(index)}: could not be read when its size was looked up")
            return {"image": image, "index": index}
        except UnreadableImage as error:
            kinds = {"small": SmallImage, "unread": UnreadFile}
            told = {name: True for name, kind in kinds.items() if isinstance(error, kind)}
            return {"index": index, "name": self.images.name(index), "reason": str(error), **told}


def _can_be_read_by_now(images: Images, shard: Shard) -> bool:
    """Whether an image that a shard lacks, since it could not be read for a moment, can be read now."""
    unread = {each["index"] for each in shard.read_record()["unreadable"] if each.get("unread")}
    attempts = _Attempts(images, shard)
    return any("image" in attempts[place] for place, index in enumerate(shard.indices) if index in unread)
