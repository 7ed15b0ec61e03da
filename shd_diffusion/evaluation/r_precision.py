"""R-precision (Xu et al. 2018, arXiv 1711.10485): whether an image tells its own prompt from others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, MetricInputs, Need
from shd_diffusion.randomness import generator

CAPTIONS = 100
SEED = 0


def own_prompt_first(
    images: Tensor, texts: Tensor, groups: Tensor, captions: int = CAPTIONS, seed: int = SEED
) -> Tensor:
    """For each image whether its own prompt is nearer to it than each of `captions` - 1 others, (N,) bool.

    The others of image j are drawn without replacement and follow from (seed, j).

    Args:
        images: features, (N, D).
        texts: features of P different prompts, (P, D).
        groups: which of them is the prompt of each image, (N,).
        captions: how many are ranked; all P where these are fewer.

    Raises:
        ValueError: there is one prompt only.
    """
    if len(texts) < 2:
        raise ValueError("one prompt alone cannot be told from others")
    images, texts = F.normalize(images.double(), dim=1), F.normalize(texts.double(), dim=1)
    found = torch.empty(len(images), dtype=torch.bool)
    for index, (image, own) in enumerate(zip(images, groups.tolist(), strict=True)):
        order = torch.randperm(len(texts) - 1, generator=generator(seed, "r_precision", index))
        others = order[: captions - 1]
        others = others + (others >= own)  # the own prompt is passed over
        found[index] = texts[own] @ image > (texts[others] @ image).max()
    return found


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of `count` independent trials."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def r_precision(
    images: Tensor, texts: Tensor, groups: Tensor, captions: int = CAPTIONS, seed: int = SEED
) -> tuple[float, float, float]:
    """The share of `own_prompt_first`, and its 95 % interval.

    Images of one prompt are not independent: each prompt that is shown counts once in the interval, by the share of its
    images.

    Args, Raises: see `own_prompt_first`.
    """
    share = own_prompt_first(images, texts, groups, captions, seed).double().mean().item()
    return share, *wilson_interval(share, len(groups.unique()))


def _entries(inputs: MetricInputs) -> dict[str, float]:
    both = inputs.image_text
    keys = ("r_precision", "r_precision_low", "r_precision_high")
    return dict(zip(keys, r_precision(both.images, both.texts, both.groups), strict=True))


def _protocol(inputs: MetricInputs) -> str:
    return f"among {min(CAPTIONS, len(inputs.image_text.texts))} captions, seed {SEED}"


def _caution(inputs: MetricInputs) -> str | None:
    count = len(inputs.image_text.texts)
    return (
        f"R-precision is among {count} captions, as there are no more different prompts; {CAPTIONS} are usual, and "
        "fewer are easier"
        if count < CAPTIONS
        else None
    )


R_PRECISION = Metric(
    "r_precision",
    _entries,
    (Column("r_precision", "R-precision", "R-prec", "higher", ".1%"),),
    needs=(Need.IMAGE_TEXT, Need.PROMPTS, Need.DIFFERENT_PROMPTS),
    usual=True,
    protocol=_protocol,
    caution=_caution,
)
