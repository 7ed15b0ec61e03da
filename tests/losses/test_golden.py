"""SHD's value and gradients are those recorded once and for all (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from golden import shd
from torch import Tensor


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return shd.stored()


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(*case, id=shd.key(*case)) for case in shd.cases()]
)
def test_value_and_gradients_are_the_recorded(
    name: str, options: shd.Options, stored: dict[str, Tensor]
) -> None:
    found = shd.compute(stored, name, options)
    for part, value in found.items():
        expected = stored[f"{shd.key(name, options)}/{part}"]
        assert value.dtype == torch.float64 and expected.any()
        # Of the tensor's scale: sums of at most some thousand terms, of 1e-16 each
        assert (value - expected).abs().max() <= 1e-12 * expected.abs().max(), part
