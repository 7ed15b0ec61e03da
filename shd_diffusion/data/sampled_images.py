"""Images that a model has sampled by class, as data: a student learns from those of its teacher, without real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shd_diffusion.data.decoding import decode
from shd_diffusion.data.image_sets import Images
from shd_diffusion.errors import UserError
from shd_diffusion.files import json_sha256
from shd_diffusion.sample_folder import SUMMARY, image_path, read_summary

LOOKED_AT = 16
"""Images are written in colour in any case; where so many are grey in every pixel, their model is."""


class SampledImages(Images):
    """What `sample` has written, as it is: images of one size with the labels that they were made of, if by any.

    Args:
        folder: such as `runs/teacher/samples`.

    Raises:
        UserError: there is no finished image; or they are made from prompts.
        UnreadableImage: one of the first is damaged.
    """

    def __init__(self, folder: Path) -> None:
        summary = read_summary(folder)
        if summary is None or not summary.num_images:
            raise UserError(
                f"data.path: {folder}: no {SUMMARY} of finished samples in it; give the folder that "
                "`shd-diffusion sample` has written, such as runs/teacher/samples"
            )
        if summary.prompts is not None:
            raise UserError(
                f"data.path: {folder}: its images are made from prompts; use `data.name: prompts`, whose latents "
                "`shd-diffusion prepare` samples"
            )
        self.folder, self.summary = folder, summary
        if summary.labels is not None:
            self.labels = torch.tensor(summary.labels)
            self.num_classes = max(summary.labels) + 1
            names = summary.class_names or {}
            if len(names) == self.num_classes:
                self.class_names = [names[number] for number in range(self.num_classes)]
        looked_at = [self._decode(index) for index in range(min(len(self), LOOKED_AT))]
        channels = 1 if all(bool((image == image[:1]).all()) for image in looked_at) else 3
        self.shape = (channels, looked_at[0].shape[1], looked_at[0].shape[2])

    def __len__(self) -> int:
        return self.summary.num_images

    def image(self, index: int) -> Tensor:
        return self._decode(index)[: self.shape[0]]

    def _decode(self, index: int) -> Tensor:
        return decode(image_path(self.folder, index), self.name(index))

    def name(self, index: int) -> str:
        return str(image_path(self.folder, index))

    def fingerprint(self) -> str:
        return json_sha256([self.summary.protocol, len(self), self.summary.labels])
