"""What a model is told of the images of a data set: labels as they are, captions by a pipeline's text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.framing import Geometry, Size
from shd_diffusion.data.image_sets import Images
from shd_diffusion.errors import UserError
from shd_diffusion.models.convention import check_convention
from shd_diffusion.models.denoiser import NOT_DROPPED, pad
from shd_diffusion.models.families import family_of
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.prompts import PromptEncoder, denoiser_name


class LabelEncoder:
    """The conditions that a data set has itself.

    Attributes:
        identity: None: nothing but the data set is behind them.
        null: what stands for no condition, (1, ...) by argument, as far as it is known here.
    """

    identity: dict[str, Any] | None = None

    def __init__(self, images: Images) -> None:
        self.images, self.null = images, images.null

    def encode(self, indices: Sequence[int]) -> list[list[dict[str, Tensor]]]:
        """The one condition of each image."""
        return [[self.images.condition(index)] for index in indices]


class CaptionEncoder:
    """The captions of images, as a text-to-image pipeline tells them to its denoiser.

    Args:
        pipeline: see `load_for_prompts`.
        arguments: of its call.
        identity: of what the captions are encoded by.
        first_only: leave all captions of an image but the first.

    Attributes:
        identity: as given.
        null: what stands for no condition, (1, ...) by argument.

    Raises:
        UserError: the pipeline takes no prompts so.
    """

    def __init__(
        self,
        images: Images,
        pipeline: DiffusionPipeline,
        arguments: Mapping[str, Any],
        identity: dict[str, Any],
        first_only: bool = False,
    ) -> None:
        self.images, self.pipeline, self.arguments = images, pipeline, arguments
        self.identity, self.first_only = identity, first_only
        self.encoders: dict[Size, PromptEncoder] = {}
        null = self._encoder(images.shape[1:]).null()
        self.null = {name: value for name, value in pad([null]).items() if name not in NOT_DROPPED}

    def check(self, shape: Sequence[int]) -> None:
        """See that the pipeline's denoiser can be trained on latents of this shape, as far as no weights are needed.

        Raises:
            UserError: it cannot; see `check_convention`.
            ValueError: its scheduler's process is not known.
        """
        ForwardProcess.from_scheduler(self.pipeline.scheduler)
        model: Any = getattr(self.pipeline, denoiser_name(self.pipeline))
        patch = family_of(model).patch or model.config.get("patch_size") or 1
        side = self.images.shape[-1] // shape[-1] * (patch if isinstance(patch, int) else max(patch))
        for height, width in self.images.buckets:
            if height % side or width % side:
                raise UserError(
                    f"its images have sides that are multiples of {side}, not {height}×{width}; change "
                    "`data.image_size` or `data.buckets`"
                )
        check_convention(self._encoder(self.images.shape[1:]), shape)

    def encode(self, indices: Sequence[int]) -> list[list[dict[str, Tensor]]]:
        """The condition of each caption of each image; the text encoders see all of them at once.

        Args:
            indices: of images of one size.

        Raises:
            UserError: an embedding is not finite.
        """
        captions = [self.images.captions(index)[: 1 if self.first_only else None] for index in indices]
        geometries = [self._geometry(index) for index in indices]
        named = [(index, text) for index, own in zip(indices, captions, strict=True) for text in own]
        found = self._encoder(geometries[0].size).encode([text for _, text in named])
        for (index, text), condition in zip(named, found, strict=True):
            if not all(value.isfinite().all() for value in condition.values()):
                raise UserError(
                    f"{self.images.name(index)}: the embedding of {text!r} is not finite; set "
                    "`prepare.prompt_dtype` to float32"
                )
        each = iter(found)
        return [
            [tell_sizes(next(each), geometry) for _ in own]
            for own, geometry in zip(captions, geometries, strict=True)
        ]

    def _geometry(self, index: int) -> Geometry:
        try:
            return self.images.geometry(index)
        except UnreadableImage:  # it is left out anyway
            return Geometry(self.images.shape[1:], (0, 0), self.images.shape[1:])

    def _encoder(self, size: Size) -> PromptEncoder:
        if size not in self.encoders:
            self.encoders[size] = PromptEncoder(self.pipeline, size, self.arguments)
        return self.encoders[size]


def tell_sizes(condition: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """The condition with the true sizes of an image, where a pipeline tells some made-up ones beside the prompt.

    SDXL (Podell et al. 2023, section 2.2) and CogView4 are told (original, crop, target), HunyuanDiT (original, target,
    crop), as their pipelines call their denoisers.
    """
    original, crop, size = geometry.original_size, geometry.crop, geometry.size
    true = {
        "added_cond_kwargs.time_ids": (*original, *crop, *size),
        "image_meta_size": (*original, *size, *crop),
        "original_size": original,
        "crop_coords": crop,
        "target_size": size,
    }
    return {
        name: value.new_tensor(true[name]) if name in true else value for name, value in condition.items()
    }
