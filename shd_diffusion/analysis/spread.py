"""How α is spread, and whether over samples, timesteps or rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one merge's coefficient at T timesteps of S samples.

    Attributes:
        mean, sd, quantiles: over everything; the quantiles are `QUANTILES`.
        clipped: share of coefficients that are 0 or 1.
        sd_timesteps, sd_samples, sd_rest: components of the variance (two-way analysis without replication; a
            negative estimate counts as 0), as standard deviations. By row they are those of the rows' means.
        sd_rows: within a sample and timestep; None where there is one coefficient for all rows.
    """

    mean: float
    sd: float
    quantiles: tuple[float, ...]
    clipped: float
    sd_timesteps: float
    sd_samples: float
    sd_rest: float
    sd_rows: float | None


def spread(coefficients: Tensor) -> Spread:
    """The spread of coefficients (T, S) or, by row, (T, S, Q); at least two timesteps and samples."""
    values = coefficients.cpu().double()
    by_row = values.ndim == 3
    timesteps, samples, rest = variance_components(values.mean(-1) if by_row else values)
    return Spread(
        mean=values.mean().item(),
        sd=values.std().item(),
        quantiles=tuple(torch.quantile(values.flatten(), torch.tensor(QUANTILES).double()).tolist()),
        clipped=((values == 0) | (values == 1)).double().mean().item(),
        sd_timesteps=timesteps**0.5,
        sd_samples=samples**0.5,
        sd_rest=rest**0.5,
        sd_rows=values.var(-1).mean().sqrt().item() if by_row else None,
    )


def variance_components(table: Tensor) -> tuple[float, float, float]:
    """Variances between rows, between columns, and of the rest, of a table (T, S) with one value a cell."""
    rows, columns = table.shape
    mean, by_row, by_column = table.mean(), table.mean(1), table.mean(0)
    residual = table - by_row[:, None] - by_column + mean
    rest = (residual.square().sum() / ((rows - 1) * (columns - 1))).item()
    of_rows = by_row.var().item() - rest / columns
    of_columns = by_column.var().item() - rest / rows
    return max(of_rows, 0.0), max(of_columns, 0.0), rest
