"""How alike a teacher and a student that is not trained yet are, as a score to choose students by: DisWOT (Dong et al.,
"DisWOT: Student Architecture Search for Distillation WithOut Training", CVPR 2023, arXiv 2303.15678).

    score = − mean over pairs of blocks of (D_semantic + D_relation)

DisWOT's semantics are class activation maps, which a denoiser has none of: here they are what its tokens attend to, the
mean map of a block's heads. Relations are those between samples, as DisWOT has them from similarity-preserving
distillation (Tung and Mori 2019). No data: the models see noise at the last timestep, which is what noise is to them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.losses.token_grid import common_grid
from shd_diffusion.models.denoiser import num_classes, predict
from shd_diffusion.randomness import generator

SAMPLES, LAST_TIMESTEP = 32, 999


def diswot_score(
    teacher: ModelMixin, student: ModelMixin, pairs: Mapping[str, str], shape: tuple[int, ...]
) -> float:
    """The score of a student, 0 at most; it compares students of one teacher.

    Args:
        pairs: student block -> teacher block.
        shape: of a sample, (C, H, W).

    Raises:
        ValueError: the models want more than a label, or two blocks cannot be compared.
    """
    noise = torch.randn(SAMPLES, *shape, generator=generator(0, "diswot"))
    of_teacher, of_student = (_records(model, noise) for model in (teacher, student))
    distances = []
    for name, by in pairs.items():
        both = of_teacher[by], of_student[name]
        maps, features = zip(*map(_on_grid, both, common_grid(*both)), strict=True)
        distances.append(semantic_distance(*maps) + relation_distance(*features))
    return -torch.stack(distances).mean().item()


def semantic_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over samples and query tokens of ‖a/‖a‖ − b/‖b‖‖², where a, b are rows of the heads' mean map.

    Args:
        teacher: maps, (B, M, Q, K).
        student: maps, (B, N, Q, K).
    """
    rows = [F.normalize(maps.mean(1), dim=-1) for maps in (teacher, student)]
    return (rows[0] - rows[1]).square().sum(-1).mean()


def relation_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """‖G_T − G_S‖² / B² of G = X Xᵀ with rows of length 1 (Tung and Mori 2019, equations 2 to 4).

    Args:
        teacher: features, (B, ...).
        student: features, (B, ...), of any other shape.
    """
    flat = [features.flatten(1) for features in (teacher, student)]
    relations = [F.normalize(rows @ rows.T, dim=1) for rows in flat]
    return (relations[0] - relations[1]).square().mean()


@torch.no_grad()
def _records(model: ModelMixin, noise: Tensor) -> dict[str, AttentionRecord]:
    """Of a pass on noise, with all labels in turn."""
    classes = num_classes(model)
    labels = {} if classes is None else {"class_labels": torch.arange(len(noise)) % classes}
    was_training = model.training
    try:
        with AttentionCapture(model.eval()) as capture:
            predict(model, noise.to(model.dtype), torch.full((len(noise),), LAST_TIMESTEP), labels)
            return dict(capture.records)
    except TypeError as error:  # a prompt is missing
        raise ValueError(f"{type(model).__name__} wants more than a label") from error
    finally:
        model.train(was_training)


def _on_grid(record: AttentionRecord, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Maps (B, H, q, k) and what they make of the values (B, H, q, d), by token of the coarser grid."""
    rows, keys = tokens
    maps = record.maps()[:, :, rows].mean(3)  # over the query tokens of one of the coarser grid
    return maps[..., keys].sum(-1), maps @ record.value.to(maps.dtype)
