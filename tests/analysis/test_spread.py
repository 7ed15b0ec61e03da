"""The spread of coefficients, and where it comes from."""

from __future__ import annotations

import numpy as np
import torch

from shd_diffusion.analysis.spread import spread, variance_components


def test_components_are_those_that_the_table_was_made_of() -> None:
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3000):
        rows, columns = (torch.randn(n, generator=source).double() for n in (6, 9))
        rest = torch.randn(6, 9, generator=source).double()
        found.append(variance_components(2.0 * rows[:, None] + 3.0 * columns + 0.5 * rest))
    np.testing.assert_allclose(np.mean(found, axis=0), [4.0, 9.0, 0.25], rtol=0.06)


def test_a_table_of_one_effect_has_no_other() -> None:
    effect = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    of_rows, of_columns, rest = variance_components(effect[:, None].expand(3, 5))
    np.testing.assert_allclose([of_rows, of_columns, rest], [effect.var().item(), 0, 0], atol=1e-12)
    assert variance_components(effect.expand(5, 3))[1] == np.float64(of_rows)


def test_moments_quantiles_and_the_share_that_is_clipped() -> None:
    values = torch.rand(4, 10, generator=torch.Generator().manual_seed(1))
    values[0, :3], values[1, 0] = 0, 1
    found = spread(values)
    flat = values.double().numpy().ravel()
    np.testing.assert_allclose([found.mean, found.sd], [flat.mean(), flat.std(ddof=1)])
    np.testing.assert_allclose(found.quantiles, np.quantile(flat, [0.05, 0.25, 0.5, 0.75, 0.95]))
    assert found.clipped == 0.1 and found.sd_rows is None


def test_rows_have_a_spread_of_their_own() -> None:
    rows = torch.linspace(0, 1, 7).double()
    found = spread(rows.expand(3, 5, 7))
    assert found.sd_rows is not None
    np.testing.assert_allclose([found.sd_rows, found.sd_rest], [rows.std().item(), 0], atol=1e-9)
