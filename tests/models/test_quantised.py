"""Students of 8 bits: how they compute, what their gradient is, and what they are saved as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DISTILL_CONFIG, command, sets
from diffusers import DiTTransformer2DModel
from safetensors.numpy import load_file
from small_models import small_dit
from torch import nn

from shd_diffusion.models.quantised import quantise


def rounded(row: np.ndarray) -> np.ndarray:
    """LLM.int8()'s absmax quantisation of a row and back, number by number."""
    step = np.abs(row).max() / 127
    return np.array([np.rint(number / step) * step for number in row])


def test_a_layer_computes_with_rounded_rows_and_its_gradient_goes_straight_through() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    features = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    quantise(layer)
    found = layer(features)
    found.square().sum().backward()
    weight = np.stack([rounded(row) for row in layer.weight.detach().numpy()])
    tokens = np.stack([rounded(token) for token in features.detach().flatten(0, 1).numpy()])
    expected = tokens @ weight.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(found.detach().flatten(0, 1).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(features.grad.flatten(0, 1).numpy(), 2 * expected @ weight, rtol=1e-12)
    np.testing.assert_allclose(layer.weight.grad.numpy(), 2 * expected.T @ tokens, rtol=1e-12)


def test_a_run_saves_plain_layers_whose_weights_are_of_8_bits(tmp_path: Path) -> None:
    small_dit(12).save_pretrained(tmp_path / "teacher")
    short = ["train.max_steps=2", "train.batch_size=4", f"teacher.path={tmp_path / 'teacher'}"]
    overrides = sets(*short, "student.quantise=int8", "student.arguments.num_layers=2")
    assert command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *overrides)[0] == 0
    (folder,) = (file.parent for file in (tmp_path / "run" / "pipeline").glob("*/config.json"))
    model = DiTTransformer2DModel.from_pretrained(folder)  # by diffusers alone
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(layers) > 12
    for name, weight in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        if name.removesuffix(".weight") in layers and weight.ndim == 2:
            steps = weight / np.abs(weight).max(1, keepdims=True).astype(np.float64) * 127
            assert steps == pytest.approx(np.rint(steps), abs=1e-4)  # float32 rounds 127 steps by 8e-6 of one
    assert "255 values a row" in (tmp_path / "run/pipeline/README.md").read_text()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_rounds_neither_weights_nor_features_once_more(half: torch.dtype) -> None:
    """The outputs are those of the 8-bit layer, but for two roundings of each to half precision."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 64)
    features = torch.randn(8, 512) * 30
    quantise(layer)
    exact = layer.double()(features.double()).detach()
    with torch.autocast("cpu", half):
        found = layer.float()(features)
    assert found.dtype == half
    bias = layer.bias.detach().abs().max()
    error = (found - exact).abs() / (
        exact.abs() + bias
    )  # half a step each of the sum and of what becomes of it
    assert error.max() < 1.01 * torch.finfo(half).eps
