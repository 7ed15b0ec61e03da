"""What a metric is: its function, what that needs, and the columns that tables show it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from torch import Tensor

from shd_diffusion.evaluation.frechet import Statistics


class Need(StrEnum):
    """What not every evaluation can give, in the words of its error."""

    LOGITS = "an extractor with logits"
    SPATIAL = "spatial Inception features, of the reference too"
    CLIP = "a CLIP extractor"
    IMAGE_TEXT = "a CLIP model for images and texts, `evaluate.clip_model`"
    OWN_CLASSES = "a classifier of the data set's own classes as extractor, or `evaluate.classes`"
    LABELS = "labels of the images"
    PROMPTS = "prompts of the images, in `sampling.json`, `metadata.jsonl` or a .txt beside each"
    DIFFERENT_PROMPTS = "two or more different prompts"
    REFERENCE = "a reference, `evaluate.reference`"
    REFERENCE_IMAGES = "reference images, not only their statistics"
    REFERENCE_LABELS = "labels of the reference images"
    REFERENCE_CAPTIONS = "captions of the reference images, `caption_column` of the data set"
    SHARED_CAPTIONS = "two or more different prompts that are captions of the reference images"


OF_THE_REFERENCE = frozenset(
    {
        Need.REFERENCE,
        Need.SPATIAL,
        Need.REFERENCE_IMAGES,
        Need.REFERENCE_LABELS,
        Need.REFERENCE_CAPTIONS,
        Need.SHARED_CAPTIONS,
    }
)
"""Needs that no evaluation without a reference meets."""

OF_THE_IMAGES = frozenset(
    {
        Need.LABELS,
        Need.PROMPTS,
        Need.DIFFERENT_PROMPTS,
        Need.REFERENCE,
        Need.REFERENCE_IMAGES,
        Need.REFERENCE_LABELS,
        Need.REFERENCE_CAPTIONS,
        Need.SHARED_CAPTIONS,
    }
)
"""Needs that images meet or do not, whatever the extractor."""


@dataclass(frozen=True)
class ImageText:
    """Images and their prompts as features of one space.

    Attributes:
        images: (N, D).
        texts: of the P different prompts, (P, D).
        groups: which of them is the prompt of each image, (N,).
        cut: how many of the prompts are longer than the model takes.
    """

    images: Tensor
    texts: Tensor
    groups: Tensor
    cut: int = 0

    @property
    def own_texts(self) -> Tensor:
        """The features of each image's prompt, (N, D)."""
        return self.texts[self.groups]


@dataclass(frozen=True)
class MetricInputs:
    """What metrics are computed from; what is not at hand is None.

    Attributes:
        roles: features of the images by role, (N, D) each, see `Extractor`.
        labels: classes of the images, (N,).
        statistics: of the reference's features, by role.
        reference: features of the reference images, (R, D).
        reference_labels: their classes, (R,).
        image_text: the images and their prompts by `evaluate.clip_model`, an `ImageText`.
        classes: which of the logits are the data set's classes 0, 1, ...; None for all, in their order.
        prompts: of the images, N.
        reference_captions: of each of the reference images, R lists.
    """

    roles: Mapping[str, Tensor]
    labels: Any
    statistics: Mapping[str, Statistics]
    reference: Any
    reference_labels: Any
    image_text: Any = None
    classes: Sequence[int] | None = None
    prompts: Any = None
    reference_captions: Any = None

    @property
    def class_logits(self) -> Tensor:
        """The logits of the data set's classes, (N, classes)."""
        logits = self.roles["logits"]
        return logits if self.classes is None else logits[:, list(self.classes)]

    @property
    def features(self) -> Tensor:
        return self.roles["features"]


@dataclass(frozen=True)
class Column:
    """A number of `metrics.json` as tables show it.

    Attributes:
        key: its name in `metrics.json`.
        title: its heading; `short` is one for a terminal.
        better: which direction is good.
        format: how it is printed, a format specification of Python; without one in three significant digits.
        deviation: the key of its standard deviation, if it has one.
    """

    key: str
    title: str
    short: str
    better: Literal["lower", "higher"]
    format: str = ""
    deviation: str | None = None


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: what `evaluate.metrics` calls it.
        compute: the value of its column, or a tuple of values and deviations in the order of the columns; or a
            dictionary of entries of `metrics.json`.
        columns: what models are compared by.
        needs: what it cannot be computed without.
        usual: computed where it can be if the config names no metrics.
        protocol: what it depends on beside the features.
        caution: what a reader of it must know, if anything.
    """

    name: str
    compute: Callable[[MetricInputs], Any]
    columns: tuple[Column, ...] = ()
    needs: tuple[Need, ...] = ()
    usual: bool = False
    protocol: Callable[[MetricInputs], str] | None = None
    caution: Callable[[MetricInputs], str | None] | None = None

    def entries(self, inputs: MetricInputs) -> dict[str, Any]:
        """Its entries of `metrics.json`."""
        value = self.compute(inputs)
        if isinstance(value, dict):
            return value
        keys = [key for column in self.columns for key in (column.key, column.deviation) if key]
        return dict(zip(keys, value if isinstance(value, tuple) else (value,), strict=True))
