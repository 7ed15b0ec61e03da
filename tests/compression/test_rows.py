"""Rows of a layer: what it reads, times its weights, is what it puts out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shd_diffusion.compression.rows import ROWS_PER_FEATURE, choose_places, features, input_rows, output_rows

LAYERS = {
    "linear": (nn.Linear(5, 3), (2, 7, 5)),
    "3x3": (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 6, 5)),
    "strided": (nn.Conv2d(4, 3, 3, stride=2, padding=1), (2, 4, 6, 6)),
    "1x1": (nn.Conv2d(4, 3, 1), (2, 4, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("some", [False, True])
def test_rows_times_weights_are_what_the_layer_puts_out(name: str, some: bool) -> None:
    layer, shape = LAYERS[name]
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    output = layer(x)
    places = torch.tensor([4, 0, 7]) if some and name != "linear" else None
    rows = input_rows(layer, x, places)
    assert rows.shape == (len(output_rows(layer, output, places)), features(layer))
    torch.testing.assert_close(
        rows @ layer.weight.flatten(1).T + layer.bias,
        output_rows(layer, output, places),
        rtol=1e-12,
        atol=1e-12,
    )
    if places is not None:
        image = output[1].flatten(1)
        torch.testing.assert_close(output_rows(layer, output, places)[3:], image[:, places].T, rtol=0, atol=0)


def test_pixels_are_drawn_where_there_are_many() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)  # 18 features
    few, many = torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 16, 16)
    assert choose_places(layer, few, 0, 2) is None
    places = [choose_places(layer, many, call, 2) for call in (0, 1)]
    for each in places:
        assert each is not None and len(each.unique()) == 18 * ROWS_PER_FEATURE / (2 * 4) and each.max() < 256
    assert not torch.equal(*places)  # type: ignore[arg-type]
    assert choose_places(nn.Linear(2, 3), torch.zeros(4, 1000, 3), 0, 2) is None
