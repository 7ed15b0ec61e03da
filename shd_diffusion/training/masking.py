"""Masked training as the authors of MDTv2 do it: every batch is seen whole and masked, and both losses are summed."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.models.adapter import num_tokens
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel, draw_ids_keep
from shd_diffusion.training.methods import Batch, Method

SUFFIX = "_masked"


class WithMasking:
    """A method on all tokens and again on the kept ones: each of its terms twice, the second as `<term>_masked`.

    Both count alike (sail-sg/MDT sums them). Teacher and student are given the same tokens.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        whole = self.method(model, replace(batch, ids_keep=None), step)
        masked = self.method(model, batch, step)
        return whole | {name + SUFFIX: term for name, term in masked.items()}

    def weights(self, step: int) -> dict[str, float]:
        weights = self.method.weights(step)
        return weights | {name + SUFFIX: weight for name, weight in weights.items()}

    def divergences(self, step: int) -> dict[str, Tensor]:
        return self.method.divergences(step)

    def parameters(self) -> list[nn.Parameter]:
        return self.method.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.method.load_state_dict(state)


def prepare_masking(model: ModelMixin, teacher: ModelMixin | None, mask_ratio: float) -> None:
    """See that the models can be trained masked; or, without masking, freeze what only masked passes train.

    DistributedDataParallel waits for the gradient of every parameter that is not frozen.

    Raises:
        ValueError: a model takes no token mask, the teacher's tokens are others, or none could be left.
    """
    if not mask_ratio:
        if isinstance(model, MDTv2Transformer2DModel):
            model.side_block.requires_grad_(False)
            model.mask_token.requires_grad_(False)
        return
    ours = num_tokens(model)
    draw_ids_keep(1, ours, mask_ratio, torch.Generator())
    if teacher is not None and (theirs := num_tokens(teacher)) != ours:
        raise ValueError(f"one mask cannot be for {ours} tokens of the student and {theirs} of the teacher")
