"""Random teachers and what they are compressed on."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from families import Family, output
from small_models import small_dit
from torch import Tensor, nn


def run_family(model: nn.Module, _: Any, __: Any, inputs: dict[str, Any]) -> Tensor:
    return output(model(**inputs))


def batches_of(family: Family, seeds: tuple[int, ...] = (1, 2, 3)) -> list[Any]:
    return [(None, None, family.draw(seed)) for seed in seeds]


def random_dit(heads: int = 4, layers: int = 2, seed: int = 0, head_dim: int = 8) -> DiTTransformer2DModel:
    """With every parameter random: as initialised, its blocks compute nothing."""
    torch.manual_seed(seed)
    model = small_dit(heads, head_dim, layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def dit_batches(count: int = 3, samples: int = 8) -> list[Any]:
    draw = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(samples, 1, 8, 8, generator=draw),
            torch.randint(1000, (samples,), generator=draw),
            torch.randint(11, (samples,), generator=draw),
        )
        for _ in range(count)
    ]


def run_dit(model: nn.Module, noised: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    return model(noised, timestep=timesteps, class_labels=labels).sample
