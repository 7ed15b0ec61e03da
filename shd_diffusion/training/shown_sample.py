"""What a reader of attention maps is shown beside them: the picture, its prompt, and which key is which word."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shd_diffusion.data import LatentSource, Source
from shd_diffusion.data.datasets import caption_of
from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.denoiser import Condition
from shd_diffusion.progress import announce

if TYPE_CHECKING:
    from shd_diffusion.models.prompt_words import Word

MAX_SIDE = 256
"""Pixels of the picture."""


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and its words.

    Attributes:
        text: None where it is not known any more.
        words: None where it cannot be told which key is which.
        length: of the text that the model attends to, in keys, padding included.
    """

    text: str | None = None
    words: list[Word] | None = None
    length: int | None = None

    def described(self) -> dict[str, Any]:
        """As plain values."""
        words = None if self.words is None else [asdict(word) for word in self.words]
        return {"prompt": self.text, "words": words}


@torch.no_grad()
def picture(source: Source, clean: Tensor, place: Path) -> Tensor:
    """One sample (C, H, W) as an image in [-1, 1], (3 or 1, H, W); of a video (C, F, H, W) its first frame.

    A latent is decoded; where its VAE cannot be had, its first channels stand for it.

    Args:
        place: what to call it in a message.
    """
    frame = (clean[:, :1] if clean.ndim == 4 else clean)[None].cpu().float()
    if isinstance(source, LatentSource):
        try:
            frame = LatentSpace(source.load_vae()).decode(frame)
        except UserError as error:
            announce(f"{place}: shows the latent of its image ({one_line(error)})")
    if frame.ndim == 5:
        frame = frame[:, :, 0]
    shrink = min(1.0, MAX_SIDE / max(frame.shape[-2:]))
    height, width = (max(1, round(side * shrink)) for side in frame.shape[-2:])
    return F.adaptive_avg_pool2d(frame, (height, width))[0, :3]


def shown_prompt(
    source: Source, pipeline: Path, number: int, condition: Condition, place: Path
) -> ShownPrompt | None:
    """The prompt of a cached sample; None where there are no prompts.

    Args:
        pipeline: that the models stand in.
        number: of the sample, e·len + i for item i in epoch e.
        condition: of the batch that it is in.
        place: what to call it in a message.
    """
    if not isinstance(source, LatentSource) or source.prompts_sha256 is None:
        return None
    epoch, index = divmod(number, len(source))
    prompt = None
    try:
        from shd_diffusion.models.prompt_words import prompt_words  # which needs transformers

        prompt = caption_of(source, index, epoch)
        arguments = source.dataset.manifest["identity"]["prompts"]["arguments"]
        by_argument = prompt_words(str(pipeline), prompt, source.image_size, arguments)
        if not by_argument:
            raise ValueError("no argument of the denoiser has a token a key")
    except Exception as error:  # of any kind: pipelines run as they like
        announce(f"{place}: numbers the tokens of its prompt ({one_line(error)})")
        return ShownPrompt(prompt)
    words, length = [], 0
    for name, own in by_argument.items():
        words += [replace(word, keys=[length + key for key in word.keys]) for word in own]
        length += condition[name].shape[1]
    return ShownPrompt(prompt, words, length)
