"""What is kept of teacher's and student's attention for the report."""

from __future__ import annotations

import numpy as np
import torch

from shd_diffusion.training.diagnostics import attention_to, reduced


def test_large_maps_are_averaged_over_areas() -> None:
    maps = torch.rand(2, 256, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = maps.numpy().reshape(2, 64, 4, 64, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(reduced(maps), expected, rtol=1e-12)
    np.testing.assert_array_equal(reduced(maps[:, :16, :16]), maps[:, :16, :16])


def test_attention_to_a_key_is_the_mean_over_heads_by_patch() -> None:
    maps = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.zeros((5, 2, 3))
    for key in range(5):
        for patch in range(6):
            for head in range(3):
                expected[key, patch // 3, patch % 3] += float(maps[head, patch, 4 + key]) / 3
    np.testing.assert_allclose(attention_to(maps, range(4, 9), (2, 3)), expected, rtol=1e-12)


def test_large_grids_keep_the_ratio_of_the_image() -> None:
    maps = torch.rand(1, 64 * 96, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found,) = attention_to(maps, range(1, 2), (64, 96))
    assert found.shape == (21, 32)
    np.testing.assert_allclose(found.mean(), maps[0, :, 1].mean(), rtol=0.02)  # areas overlap by a pixel
