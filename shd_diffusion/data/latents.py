"""Latents that `shd-diffusion prepare` has cached: a manifest, and shards of moments and labels.

    manifest.json                       what the latents were made from, and the shards with their checksums
    shards/latents-00000.safetensors    "labels" (n,), "moments" (n, 2, 2C, h, w) where n > 0

Axis 1 of the moments is the image as it is and mirrored; axis 2 is C means, then C log-variances, unscaled.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.data.source import Source
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json
from shd_diffusion.progress import progress_bar

MANIFEST = "manifest.json"
READERS = 8


class LatentCache(Dataset[tuple[Tensor, int]]):
    """Item i is the moments of a latent, (copies, 2C, h, w), and its label; read from memory-mapped shards.

    Args:
        folder: written by `prepare`.
        copies: 2 with the mirrored image, 1 without.
        verify: compare every shard with its checksum first.

    Raises:
        UserError: the cache is not complete, or a shard is missing or damaged.
    """

    def __init__(self, folder: Path, copies: int, verify: bool) -> None:
        self.folder, self.copies = folder, copies
        self.manifest = read_manifest(folder)
        shards = self.manifest["shards"]
        self.paths = [folder / shard["file"] for shard in shards]
        check_shards(folder, shards, verify)
        self.ends = np.cumsum([shard["images"] for shard in shards])
        self.open_shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[number - 1]) if number else 0)
        if number not in self.open_shards:
            self.open_shards[number] = self._open(number)
        moments, labels = self.open_shards[number]
        return moments[row, : self.copies], int(labels[row])

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in the process that opened them."""
        return {**self.__dict__, "open_shards": {}}

    def _open(self, number: int) -> tuple[Any, Tensor]:
        """The moments, not yet read, and the labels of a shard."""
        path = self.paths[number]
        try:
            shard = safe_open(path, framework="pt")
            return shard.get_slice("moments"), shard.get_tensor("labels")
        except (OSError, SafetensorError) as error:
            raise damaged(path, str(error)) from None


class LatentSource(Source):
    """Latents, sampled from cached moments and scaled as the VAE's config says."""

    needs_noise = True

    def __init__(
        self, folder: Path, horizontal_flip: bool = False, num_workers: int = 0, verify: bool = True
    ) -> None:
        self.dataset: LatentCache = LatentCache(folder, copies=2 if horizontal_flip else 1, verify=verify)
        manifest = self.dataset.manifest
        channels, height, width = manifest["shape"]
        self.shape, self.num_classes = (channels, height, width), manifest["num_classes"]
        self.vae: str = manifest["vae"]["path"]
        self.scaling_factor: float = manifest["vae"]["scaling_factor"]
        self.shift_factor: float = manifest["vae"]["shift_factor"]
        self.horizontal_flip, self.num_workers = horizontal_flip, num_workers

    def clean(self, items: Tensor, flipped: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise ValueError("latents are sampled with noise")
        moments = items[:, 0].float()
        if self.horizontal_flip:
            moments = torch.where(flipped[:, None, None, None], items[:, 1].float(), moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (log_variance / 2).exp() * noise - self.shift_factor) * self.scaling_factor


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete cache.

    Raises:
        UserError: there is none, or `prepare` has not ended.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"data.path: {folder}: no {MANIFEST} in it; give the output of `shd-diffusion prepare`"
        )
    manifest = read_json(folder / MANIFEST)
    if not manifest.get("shards"):
        raise UserError(
            f"data.path: {folder}: not complete; run its `shd-diffusion prepare` again to continue it"
        )
    return manifest


def check_shards(folder: Path, shards: list[dict[str, Any]], verify: bool) -> None:
    """See that all shards are there in their size and, with `verify`, in their checksum.

    Raises:
        UserError: one is not; it is named.
    """
    for shard in shards:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise damaged(path, f"{size} bytes instead of {shard['bytes']}")
    if not verify:
        return
    with (
        ThreadPoolExecutor(READERS) as readers,
        progress_bar(len(shards), f"verify {folder.name}", "shard") as bar,
    ):
        for shard, found in zip(
            shards, readers.map(lambda one: sha256(folder / one["file"]), shards), strict=True
        ):
            if found != shard["sha256"]:
                raise damaged(folder / shard["file"], "its checksum is not that of the manifest")
            bar.update()


def damaged(path: Path, reason: str) -> UserError:
    """What to say of a damaged shard."""
    return UserError(f"{path}: damaged ({reason}); run `shd-diffusion prepare` again to write it anew")


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
