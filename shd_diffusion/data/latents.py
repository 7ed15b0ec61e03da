"""Latents that `shd-diffusion prepare` has cached: a manifest, and shards of moments and conditions.

    manifest.json                       what the latents are and were made from, and the shards with their checksums
    null.safetensors                    the condition that stands for none, (1, ...), where the data have one
    shards/latents-00000.safetensors    "moments" (n, 2, k·C, h, w) and each condition (c, ...) by its name

Axis 1 of the moments is the image as it is and mirrored; axis 2 is as `LatentSpace.encode` gives it, unscaled. Images
with captions have a condition a caption, and "captions" (n + 1,): those of image i are from [i] up to [i + 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.data.latent_space import LatentScaling, load_vae, sample_latents
from shd_diffusion.data.source import Source, mirrored_where
from shd_diffusion.data.unreadable import Unreadable
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import json_sha256, read_json, sha256
from shd_diffusion.hashing import hash_model
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar

MANIFEST = "manifest.json"
READERS = 8


class LatentCache(Dataset[dict[str, Tensor]]):
    """Item i is {"moments": (copies, k·C, h, w), **condition}, read from memory-mapped shards.

    Args:
        folder: written by `prepare`.
        copies: 2 with the mirrored image, 1 without.
        verify: compare every shard with its checksum first.

    Raises:
        UserError: the cache is not complete, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, copies: int, verify: bool) -> None:
        self.copies, self.manifest = copies, read_manifest(folder)
        shards = self.manifest["shards"]
        check_shards(folder, shards, verify)
        self.paths = [folder / shard["file"] for shard in shards]
        self.ends = np.cumsum([shard["images"] for shard in shards])
        self.open_shards: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> dict[str, Tensor]:
        """Item `index`; of several captions the one of `caption_number`."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[number - 1]) if number else 0)
        if number not in self.open_shards:
            self.open_shards[number] = self._open(number)
        shard = dict(self.open_shards[number])
        moments = torch.as_tensor(shard.pop("moments")[row])[: self.copies]
        if (captions := shard.pop("captions", None)) is not None:
            first, after = captions[row : row + 2].tolist()
            row = first + caption_number(index, epoch, after - first)
        return {"moments": moments, **{name: torch.as_tensor(part[row]) for name, part in shard.items()}}

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in the process that opened them."""
        return {**self.__dict__, "open_shards": {}}

    def _open(self, number: int) -> dict[str, Any]:
        """The tensors of a shard, not yet read."""
        path = self.paths[number]
        try:
            shard = safe_open(path, framework="pt")
            lists = {"captions": shard.get_tensor("captions")} if "captions" in shard.keys() else {}  # noqa: SIM118
            return lists | {name: shard.get_slice(name) for name in ("moments", *self.manifest["conditions"])}
        except (OSError, SafetensorError) as error:
            raise damaged(path, str(error)) from None


class LatentSource(Source):
    """Latents, sampled from cached moments and scaled as their VAE's are.

    Attributes:
        vae: path or hub name of the VAE that encoded them.
        vae_sha256: of its config and weights, see `hash_model`.
        prompts_sha256: of what encoded the prompts, see `PipelineFolder.hash_prompt_parts`; None without prompts.
        images: the keys of the data set that they were made from, as `prepare` had them.
        encoded: keys of `prepare` on which the cache depends.
        images_sha256: its fingerprint.
        scaling: of the latents.
    """

    def __init__(
        self, folder: Path, horizontal_flip: bool = False, num_workers: int = 0, verify: bool = True
    ) -> None:
        self.dataset: LatentCache = LatentCache(folder, copies=2 if horizontal_flip else 1, verify=verify)
        manifest = self.dataset.manifest
        self.shape, self.num_classes = tuple(manifest["shape"]), manifest["num_classes"]
        self.class_names = manifest.get("class_names")
        self.image_size = tuple(manifest["identity"]["image_shape"][-2:])
        self.condition_names = list(manifest["conditions"])
        self.null = _read_null(folder / manifest["null"], manifest) if manifest["null"] else {}
        self.needs_noise = manifest["has_variance"]
        self.vae: str = manifest["vae"]["path"]
        self.vae_sha256: str = manifest["identity"]["vae"]
        self.prompts_sha256: str | None = (manifest["identity"].get("prompts") or {}).get("encoders")
        self.images: dict[str, Any] = manifest.get("data") or {}
        self.encoded = _keys_of_prepare(manifest["identity"])
        self.images_sha256: str = manifest["identity"]["source"]
        self.scaling = LatentScaling(**manifest["vae"]["scaling"])
        if horizontal_flip and "sampling" in manifest["identity"]:
            raise UserError(
                "data.horizontal_flip: a teacher has sampled these latents, none of them mirrored; set it to false"
            )
        self.horizontal_flip, self.num_workers = horizontal_flip, num_workers
        self._groups = groups_of(manifest["shards"])

    @property
    def groups(self) -> list[range]:
        return self._groups

    def shape_of(self, items: Mapping[str, Tensor]) -> tuple[int, ...]:
        return self.shape[0], *items["moments"].shape[3:]

    def clean(self, items: Mapping[str, Tensor], flipped: Tensor, noise: Tensor | None) -> Tensor:
        if self.needs_noise and noise is None:
            raise ValueError("latents are sampled with noise")
        both = items["moments"].float()
        moments = mirrored_where(flipped, both[:, 0], both[:, 1]) if self.horizontal_flip else both[:, 0]
        return self.scaling.normalise(sample_latents(moments, noise))

    def attempt(self, index: int, epoch: int) -> tuple[dict[str, Tensor], Unreadable]:
        return self.dataset.item(index, epoch), {}

    def condition(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings may be kept in half precision; the models' own is theirs to choose."""
        found = super().condition(items)
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    def fingerprint(self) -> str:
        # Wherever the images and the VAE lie, which `identity` knows by their hashes.
        manifest = self.dataset.manifest
        return checksum({**manifest, "data": None, "vae": manifest["vae"] | {"path": None}})

    def load_vae(self) -> ModelMixin:
        """The VAE that the latents were encoded by.

        Raises:
            UserError: it cannot be loaded, or is another by now.
        """
        vae = load_vae(self.vae)
        if hash_model(vae) != self.vae_sha256:
            raise UserError(
                f"{self.vae}: is not the VAE that encoded these latents any more; bring that one back, "
                "or run `shd-diffusion prepare` with another --output"
            )
        return vae


def _keys_of_prepare(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `prepare`, by what a manifest says that a cache follows from."""
    prompts = identity.get("prompts") or {}
    found = {
        "dtype": identity.get("dtype"),
        "prompt_dtype": prompts.get("dtype"),
        "prompt_arguments": prompts.get("arguments"),
        "teacher_sampling": identity.get("sampling"),
    }
    return {key: value for key, value in found.items() if value is not None}


def caption_number(index: int, epoch: int, count: int) -> int:
    """Which of so many captions item `index` has in an epoch: each the next one, the first another one by image."""
    return (epoch + index) % count


def groups_of(shards: list[dict[str, Any]]) -> list[range]:
    """Items of one size each: shards of a bucket follow each other."""
    groups, start = [], 0
    for _, bucket in groupby(shards, key=lambda shard: shard.get("size")):
        count = sum(shard["images"] for shard in bucket)
        groups += [range(start, start + count)] if count else []
        start += count
    return groups


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says beside it."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return json_sha256(rest)


def read_manifest(folder: Path, complete: bool = True) -> dict[str, Any]:
    """The manifest of a cache, as `prepare` wrote it.

    Raises:
        UserError: there is none, it was changed or cut off, or `prepare` has not ended though it should be `complete`.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: no cache of latents (no {MANIFEST} in it); run `shd-diffusion prepare CONFIG` first, or give "
            "its output"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("checksum") != checksum(manifest):
        raise UserError(f"{path}: was changed since; delete it and run `shd-diffusion prepare` again")
    if complete and not manifest["shards"]:
        raise UserError(
            f"data.path: {folder}: not complete; run its `shd-diffusion prepare` again to continue it"
        )
    return manifest


def check_shards(folder: Path, shards: list[dict[str, Any]], verify: bool) -> None:
    """See that all shards are there in their size and, with `verify`, in their checksum.

    One process a machine looks, the others wait; what it finds wrong is raised in all.

    Raises:
        UserError: one is not; it is named.
    """
    found: list[str | None] = [None]
    if processes().is_local_main_process:
        try:
            _check_shards(folder, shards, verify)
        except UserError as error:
            found = [str(error)]
    for message in gather_object(found):
        if message is not None:
            raise UserError(message)


def _check_shards(folder: Path, shards: list[dict[str, Any]], verify: bool) -> None:
    paths = [folder / shard["file"] for shard in shards]
    for path, shard in zip(paths, shards, strict=True):
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise damaged(path, f"{size} bytes instead of {shard['bytes']}")
    if not verify:
        return
    with (
        ThreadPoolExecutor(READERS) as readers,
        progress_bar(len(shards), f"verify {folder.name}", "shard") as bar,
    ):
        for path, shard, found in zip(paths, shards, readers.map(sha256, paths), strict=True):
            if found != shard["sha256"]:
                raise damaged(path, "its checksum is not that of the manifest")
            bar.update()


def _read_null(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The condition that stands for none.

    Raises:
        UserError: it is missing, torn, or not what was written.
    """
    try:
        if manifest.get("null_sha256", digest := sha256(path)) != digest:
            raise damaged(path, "has changed")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, one_line(error)) from None


def damaged(path: Path, reason: str) -> UserError:
    """What to say of a damaged file."""
    return UserError(f"{path}: damaged ({reason}); run `shd-diffusion prepare` again to write it anew")
