"""The weight of a norm over all heads after some have left, against numpy's least squares."""

import numpy as np
import pytest
import torch

from shd_diffusion.squeezing.norms import ChannelMoments

TOKENS, CHANNELS = 40, 5


def moments_of(x: np.ndarray, y: np.ndarray) -> ChannelMoments:
    moments = ChannelMoments.zeros(x.shape[1])
    for rows in np.array_split(np.arange(len(x)), 3):
        moments.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    return moments


def test_factor_and_line_are_least_squares_in_each_channel():
    random = np.random.default_rng(0)
    x = random.normal(size=(TOKENS, CHANNELS)) + 1
    y = 3 * x + random.normal(size=(TOKENS, CHANNELS)) - 2
    moments = moments_of(x, y)
    factor, (slope, shift) = moments.factor().numpy(), moments.line()
    for i in range(CHANNELS):
        assert factor[i] == pytest.approx(np.linalg.lstsq(x[:, i : i + 1], y[:, i], rcond=None)[0][0])
        expected = np.linalg.lstsq(np.stack([x[:, i], np.ones(TOKENS)], 1), y[:, i], rcond=None)[0]
        np.testing.assert_allclose([slope[i], shift[i]], expected)


def test_channels_that_are_the_same_in_all_tokens():
    x = np.tile([0.0, 2.0], (TOKENS, 1))
    moments = moments_of(x, x + 1)
    slope, shift = moments.line()
    assert moments.factor().tolist() == [1.0, 1.5]
    assert slope.tolist() == [1.0, 1.0] and shift.tolist() == [1.0, 1.0]
