"""Feature distillation: the student's block outputs through a linear projector against the teacher's.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), with the linear projector of the SHD
paper's comparison. Extra parameters: C_student · C_teacher + C_teacher for each mapped block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shd_diffusion.losses.term import (
    MappedTermConfig,
    StepOutputs,
    Term,
    TermConfig,
    enclosing_block,
    map_traces,
)
from shd_diffusion.models.trace import Trace

_OTHER_TOKENS = (
    "{} has {} tokens, the teacher's {} {}: features are compared token by token; choose models of one grid"
)


class FeatureDistillation(Term):
    """Mean over mapped blocks of ||P(student) - teacher||², averaged over samples, tokens and channels.

    Attributes:
        projectors: P by pair, in the order of `pairs`.
    """

    Config: ClassVar[type[TermConfig]] = MappedTermConfig
    captures = "outputs"

    def __init__(
        self, config: MappedTermConfig, student: Trace, teacher: Trace | None, seed: int = 0
    ) -> None:
        super().__init__(config, student, teacher, seed)
        assert teacher is not None
        # a block with several attention modules is matched once
        modules = {
            self.module(name): (student.width(name), self.module(by), teacher.width(by))
            for name, by in map_traces(student, teacher, config.layer_map).items()
        }
        self.pairs = {name: by for name, (_, by, _) in modules.items()}
        for name, by in map_traces(student, teacher, config.layer_map).items():
            if student.records[name].kind == "joint":
                raise ValueError(
                    f"{name} puts out two streams, image and text: they have no features to match yet"
                )
            counts = student.records[name].query.shape[2], teacher.records[by].query.shape[2]
            if counts[0] != counts[1]:
                raise ValueError(_OTHER_TOKENS.format(name, counts[0], by, counts[1]))
        self.projectors = nn.ModuleList(self.projector(own, other) for own, _, other in modules.values())

    def module(self, attention: str) -> str:
        """The module whose output is matched, by the attention module in it."""
        return enclosing_block(attention)

    def projector(self, student_width: int, teacher_width: int) -> nn.Module:
        """From the student's width to the teacher's."""
        return nn.Linear(student_width, teacher_width)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """Of features (B, N, C): a scalar."""
        return F.mse_loss(projected, target)

    def forward(self, outputs: StepOutputs) -> Tensor:
        """See the class.

        Raises:
            ValueError: a pair whose numbers of tokens differ.
        """
        distances = []
        for (name, by), projector in zip(self.pairs.items(), self.projectors, strict=True):
            features, target = matched_tokens(outputs.student.outputs, name, outputs.teacher.outputs, by)
            distances.append(self.distance(projector(features), target))
        return torch.stack(distances).mean()


def matched_tokens(
    student: Mapping[str, Tensor], name: str, teacher: Mapping[str, Tensor], by: str
) -> tuple[Tensor, Tensor]:
    """The tokens of a pair, (B, N, C_student) and (B, N, C_teacher), the teacher's without gradients.

    Raises:
        ValueError: their numbers of tokens differ.
    """
    features, target = tokens(student[name]), tokens(teacher[by]).detach()
    if features.shape[1] != target.shape[1]:
        raise ValueError(_OTHER_TOKENS.format(name, features.shape[1], by, target.shape[1]))
    return features, target


def tokens(output: Tensor) -> Tensor:
    """An output as tokens (B, N, C) in float32 or better; images (B, C, H, W) become H·W of them."""
    flat = output.flatten(2).mT if output.ndim > 3 else output
    return flat.double() if flat.dtype.itemsize == 8 else flat.float()
