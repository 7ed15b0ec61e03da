"""The metrics as objects of torchmetrics, for anybody's training loop: `update(images, real=True)`, `compute()`.

They are the functions that `evaluate` calls, on the same features. Processes are joined when `compute` is called, as
torchmetrics does it; a `torchmetrics.MetricCollection` of them extracts the features of an image once for all but the
Fréchet distance, which keeps no features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric as TorchMetric
from torchmetrics.utilities import dim_zero_cat

from shd_diffusion.evaluation.cmmd import CMMD as CMMD_METRIC
from shd_diffusion.evaluation.density_coverage import DENSITY_COVERAGE
from shd_diffusion.evaluation.extractors import Extractor, image_size_of, load_extractor
from shd_diffusion.evaluation.frechet import Statistics, Sums, frechet_distance
from shd_diffusion.evaluation.inception_score import INCEPTION_SCORE
from shd_diffusion.evaluation.kid import KID
from shd_diffusion.evaluation.metric import Metric, MetricInputs, Need
from shd_diffusion.evaluation.mind import MIND
from shd_diffusion.evaluation.precision_recall import PRECISION_RECALL

__all__ = [
    "CMMD",
    "DensityCoverage",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "MongeDistance",
    "PrecisionRecall",
]

SIDES = {True: "reference", False: "generated"}


class ImageMetric(TorchMetric):
    """What all have in common.

    Args:
        extractor: the name of one (`evaluate.extractor`), or a network from images to features (N, D), in evaluation
            mode; it may be shared by many metrics.
        reset_real_features: whether `reset` forgets the real images too.
        options: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    role: ClassVar[str] = "features"

    def __init__(
        self, extractor: str | nn.Module, *, reset_real_features: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
        self.reset_real_features = reset_real_features

    def features(self, images: Tensor) -> Tensor:
        """Images to features (N, D); those of the project's extractors are 8-bit (N, 3, H, W)."""
        if isinstance(self.extractor, Extractor):
            if images.dtype != torch.uint8:
                raise ValueError(
                    f"`{self.extractor.name}` takes 8-bit images (N, 3, H, W), not {images.dtype}"
                )
            return self.extractor.roles(images)[self.role]
        return self.extractor(images)

    def reset(self) -> None:
        of_real = [name for name in self._defaults if name.startswith(SIDES[True])]
        kept = {} if self.reset_real_features else {name: self._defaults.pop(name) for name in of_real}
        super().reset()
        self._defaults.update(kept)

    def train(self, mode: bool = True) -> ImageMetric:
        """Nothing: a metric that is part of a model in training has its extractor in evaluation mode all the same."""
        return super().train(False)


class FrechetDistance(ImageMetric):
    """FID, FD or FDD by the extractor; of any number of images it keeps sums alone.

    Args:
        reference: statistics of the real images, in place of `update(images, real=True)`.
        num_features: of the extractor; by default its own `num_features`, or what it makes of an image.
    """

    higher_is_better = False

    def __init__(
        self,
        extractor: str | nn.Module,
        *,
        reference: Statistics | None = None,
        num_features: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(extractor, **options)
        self.reference = reference
        width = num_features or getattr(self.extractor, "num_features", None) or self._width()
        for side in SIDES.values():
            for name, zeros in vars(Sums.of(torch.zeros(0, width))).items():
                self.add_state(f"{side}_{name}", zeros, dist_reduce_fx="sum")

    @torch.no_grad()
    def _width(self) -> int:
        name = getattr(self.extractor, "name", "")
        side = image_size_of(name) or 299
        parameter = next(self.extractor.parameters(), torch.empty(0))
        return self.extractor(
            torch.zeros(1, 3, side, side, dtype=torch.uint8, device=parameter.device)
        ).shape[1]

    def update(self, images: Tensor, real: bool) -> None:
        """Add images (N, 3, H, W).

        Raises:
            ValueError: real ones, where the reference is given.
        """
        if real and self.reference is not None:
            raise ValueError("the reference is given: it takes no real images")
        for name, value in vars(Sums.of(self.features(images))).items():
            state = f"{SIDES[real]}_{name}"
            setattr(self, state, getattr(self, state) + value)

    def compute(self) -> Tensor:
        """The distance, in float64."""
        generated, reference = (
            Sums(**{name: getattr(self, f"{side}_{name}") for name in ("count", "total", "products")})
            for side in (SIDES[False], SIDES[True])
        )
        real = reference.statistics() if self.reference is None else self.reference
        # where the reference is, since it keeps the root that takes long
        distance = frechet_distance(generated.statistics().to(real.mean.device), real)
        return torch.tensor(distance, dtype=torch.float64, device=self.device)


class FeatureMetric(ImageMetric):
    """A metric of the registry that is computed on all features, which it keeps.

    Which samples are drawn together follows from their order: first the first process's, then the second's.

    Attributes:
        metric: of the registry.
    """

    metric: ClassVar[Metric]
    width: Tensor
    generated: list[Tensor]
    reference: list[Tensor]

    def __init__(self, extractor: str | nn.Module, **options: Any) -> None:
        super().__init__(extractor, **options)
        self.add_state("width", torch.tensor(0), dist_reduce_fx="max")
        for side in SIDES.values():
            # flat, as torchmetrics joins nothing else with the empty side of a process that had no images
            self.add_state(side, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Add images (N, 3, H, W). Real ones do nothing where the metric compares with none."""
        if not real or Need.REFERENCE_IMAGES in self.metric.needs:
            features = self.features(images).to(self.dtype)
            self.width = torch.full_like(self.width, features.shape[1])
            getattr(self, SIDES[real]).append(features.flatten())

    def compute(self) -> Tensor | tuple[Tensor, ...]:
        """The values of the metric's columns, in float64; a mean is followed by its standard deviation."""
        generated, reference = (
            dim_zero_cat(side).cpu().view(-1, int(self.width)) if len(side) else None
            for side in (self.generated, self.reference)
        )
        compares = Need.REFERENCE_IMAGES in self.metric.needs
        if generated is None or (reference is None and compares):
            raise ValueError(
                f"{type(self).__name__} "
                + (
                    "compares generated with real images: update it with both before"
                    if compares
                    else "is of generated images: update it with some before"
                )
            )
        values = self.metric.compute(MetricInputs({self.role: generated}, None, {}, reference, None))
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        return tuple(found) if isinstance(values, tuple) else found


class KernelDistance(FeatureMetric):
    """KID and its standard deviation over subsets; `kid.py`."""

    metric = KID
    higher_is_better = False


class MongeDistance(FeatureMetric):
    """MIND; `mind.py`."""

    metric = MIND
    higher_is_better = False


class CMMD(FeatureMetric):
    """CMMD, of an extractor that is a CLIP model; `cmmd.py`."""

    metric = CMMD_METRIC
    higher_is_better = False


class PrecisionRecall(FeatureMetric):
    """Precision, and recall; `precision_recall.py`."""

    metric = PRECISION_RECALL
    higher_is_better = True


class DensityCoverage(FeatureMetric):
    """Density, and coverage; `density_coverage.py`."""

    metric = DENSITY_COVERAGE
    higher_is_better = True


class InceptionScore(FeatureMetric):
    """Inception Score and its standard deviation over splits, of a network that gives logits; `inception_score.py`."""

    metric = INCEPTION_SCORE
    higher_is_better = True
    role = "logits"
