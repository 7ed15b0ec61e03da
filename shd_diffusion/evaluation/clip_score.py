"""CLIP score (Hessel et al. 2021, arXiv 2104.08718), on the scale of torchmetrics: 100 times the mean cosine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, MetricInputs, Need


def clip_score(images: Tensor, texts: Tensor) -> float:
    """max(100 · mean of cos(image, text), 0), as torchmetrics' `CLIPScore` has it.

    That class itself is called by the tests only: it would take the images through the model once more, refuses
    folders, fails with transformers 5, and cuts off the end token of long prompts, whose state is the feature.

    Args:
        images: features of the images, (N, D).
        texts: features of the prompt of each, (N, D).
    """
    return max(100 * F.cosine_similarity(images.double(), texts.double()).mean().item(), 0.0)


def _caution(inputs: MetricInputs) -> str | None:
    cut, count = inputs.image_text.cut, len(inputs.image_text.texts)
    return (
        f"{cut} of {count} prompts are longer than the CLIP model takes: it saw their beginning"
        if cut
        else None
    )


CLIP_SCORE = Metric(
    "clip_score",
    lambda inputs: clip_score(inputs.image_text.images, inputs.image_text.own_texts),
    (Column("clip_score", "CLIP score", "CLIP", "higher", ".2f"),),
    needs=(Need.IMAGE_TEXT, Need.PROMPTS),
    usual=True,
    caution=_caution,
)
