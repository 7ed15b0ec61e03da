"""R-precision against pictures: whether an image is nearer to the real pictures of its own caption than to others'.

R-precision (Xu et al. 2018, arXiv 1711.10485) with real pictures where that has texts, so that the features of any
extractor will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, MetricInputs, Need
from shd_diffusion.evaluation.r_precision import CAPTIONS, SEED, wilson_interval
from shd_diffusion.randomness import generator

CHUNK = 256  # images that are compared at once
TIE = 1e-9  # cosines that differ by less are equal: features are of single precision


class Captioned:
    """Real pictures by their captions.

    Args:
        captions: of each picture, one or more.

    Attributes:
        pictures: the indices of the pictures of each caption; captions in the order in which they come first.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        self.captions = [[caption.strip() for caption in of_one] for of_one in captions]
        self.pictures: dict[str, list[int]] = {}
        for index, of_one in enumerate(self.captions):
            for caption in dict.fromkeys(of_one):
                self.pictures.setdefault(caption, []).append(index)
        self.numbers = {caption: number for number, caption in enumerate(self.pictures)}

    def sharing(self, caption: str) -> set[str]:
        """The captions that share a picture with this one, itself among them."""
        return {other for index in self.pictures[caption] for other in self.captions[index]}

    def others(self, caption: str, count: int, seed: int) -> list[str]:
        """Up to `count` captions that share no picture with this one, drawn without replacement.

        They follow from the seed and the caption's place in the reference.
        """
        sharing = self.sharing(caption)
        known = list(self.pictures)
        random = generator(seed, "picture_precision", self.numbers[caption])
        drawn = (known[number] for number in torch.randperm(len(known), generator=random).tolist())
        return list(islice((other for other in drawn if other not in sharing), count))


def shared_captions(prompts: Sequence[str], captions: Sequence[Sequence[str]]) -> set[str]:
    """The prompts that are captions of real pictures, where other captions have pictures of their own."""
    real = Captioned(captions)
    return {
        prompt
        for prompt in {each.strip() for each in prompts}
        if prompt in real.pictures and len(real.sharing(prompt)) < len(real.pictures)
    }


def own_picture_first(
    images: Tensor,
    prompts: Sequence[str],
    pictures: Tensor,
    captions: Sequence[Sequence[str]],
    among: int = CAPTIONS,
    seed: int = SEED,
) -> Tensor:
    """For each image whether a picture of its own caption is nearer to it than all of `among` - 1 others, (N,) bool.

    Nearness is the cosine of features; of several pictures of a caption the nearest counts. The others follow from
    (seed, caption), so that all images of one caption are held against the same. Captions that share a picture with
    the own one are none of them. A tie is no success.

    Args:
        images: features, (N, D).
        prompts: of the images, each in `shared_captions`.
        pictures: features of the real pictures, (R, D).
        captions: of each of these.
        among: how many captions are ranked; all where these are fewer.
    """
    real = Captioned(captions)
    images, pictures = F.normalize(images.double(), dim=1), F.normalize(pictures.double(), dim=1)
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt.strip(), []).append(index)
    found = torch.empty(len(images), dtype=torch.bool)
    for prompt, shown in by_prompt.items():
        own = pictures[real.pictures[prompt]]
        others = pictures[
            sorted({i for other in real.others(prompt, among - 1, seed) for i in real.pictures[other]})
        ]
        for some in torch.tensor(shown).split(CHUNK):
            nearest, nearest_other = ((images[some] @ side.T).amax(dim=1) for side in (own, others))
            found[some] = nearest > nearest_other + TIE
    return found


def _shared(inputs: MetricInputs) -> tuple[set[str], list[int]]:
    """The captions that can be judged, and the images that have them."""
    shared = shared_captions(inputs.prompts, inputs.reference_captions)
    return shared, [index for index, prompt in enumerate(inputs.prompts) if prompt.strip() in shared]


def _entries(inputs: MetricInputs) -> dict[str, float]:
    shared, kept = _shared(inputs)
    prompts = [inputs.prompts[index] for index in kept]
    first = own_picture_first(inputs.features[kept], prompts, inputs.reference, inputs.reference_captions)
    share = first.double().mean().item()
    low, high = wilson_interval(share, len(shared))  # images of one caption are not independent
    return {
        "picture_precision": share,
        "picture_precision_low": low,
        "picture_precision_high": high,
    }


def _ranked(inputs: MetricInputs) -> int:
    """How many captions an image is held against, its own among them."""
    return min(CAPTIONS, len(Captioned(inputs.reference_captions).pictures))


def _protocol(inputs: MetricInputs) -> str:
    return f"among {_ranked(inputs)} captions of the reference, seed {SEED}"


def _caution(inputs: MetricInputs) -> str | None:
    _, kept = _shared(inputs)
    told = []
    if left_out := len(inputs.prompts) - len(kept):
        told.append(
            f"is of {len(kept)} images, as the prompts of {left_out} others are no captions of the reference"
        )
    if (count := _ranked(inputs)) < CAPTIONS:
        told.append(
            f"is among {count} captions, all of the reference; {CAPTIONS} are usual, and fewer are easier"
        )
    return f"R-precision (pictures) {', and '.join(told)}" if told else None


PICTURE_PRECISION = Metric(
    "picture_precision",
    _entries,
    (Column("picture_precision", "R-precision (pictures)", "R-prec(pic)", "higher", ".1%"),),
    needs=(
        Need.PROMPTS,
        Need.REFERENCE,
        Need.REFERENCE_IMAGES,
        Need.REFERENCE_CAPTIONS,
        Need.SHARED_CAPTIONS,
    ),
    usual=True,
    protocol=_protocol,
    caution=_caution,
)
