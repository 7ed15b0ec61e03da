"""FID on Inception's pooled features, sFID on its spatial ones, FD on those of another network.

The same function of other features: Heusel et al. 2017, arXiv 1706.08500; Nash et al. 2021, arXiv 2103.03841.
"""

from __future__ import annotations

from shd_diffusion.evaluation.frechet import feature_statistics, frechet_distance
from shd_diffusion.evaluation.metric import Column, Metric, MetricInputs, Need


def _distance(inputs: MetricInputs, role: str) -> float:
    return frechet_distance(feature_statistics(inputs.roles[role]), inputs.statistics[role])


_COLUMN, _SPATIAL_COLUMN = (Column(name.lower(), name, name, "lower", ".2f") for name in ("FID", "sFID"))
FID = Metric("fid", lambda inputs: _distance(inputs, "features"), (_COLUMN,), (Need.REFERENCE,), usual=True)
SFID = Metric(
    "sfid", lambda inputs: _distance(inputs, "spatial"), (_SPATIAL_COLUMN,), (Need.SPATIAL,), usual=True
)
