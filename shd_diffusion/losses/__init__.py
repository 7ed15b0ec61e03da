"""The loss: its terms, each a file of this room, and what several of them need beside them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import create_model, model_validator

from shd_diffusion.losses.acam import AdaptiveMasks
from shd_diffusion.losses.affinity import Affinity
from shd_diffusion.losses.aligner import HeadAligner
from shd_diffusion.losses.attention_mse import AttentionMSE
from shd_diffusion.losses.attention_output import AttentionOutput
from shd_diffusion.losses.contrastive import Contrastive
from shd_diffusion.losses.denoise import Denoise
from shd_diffusion.losses.features import FeatureDistillation
from shd_diffusion.losses.minilm import MiniLM
from shd_diffusion.losses.norm_direction import NormDirection
from shd_diffusion.losses.output import OutputDistillation
from shd_diffusion.losses.shd import SHD, SHDConfig, SHDLoss
from shd_diffusion.losses.term import Term, TermConfig
from shd_diffusion.losses.variance import Variance
from shd_diffusion.losses.vkd import VkD
from shd_diffusion.models.trace import Trace
from shd_diffusion.section import Section

TERMS: dict[str, type[Term]] = {
    "denoise": Denoise,
    "variance": Variance,
    "output": OutputDistillation,
    "shd": SHD,
    "features": FeatureDistillation,
    "vkd": VkD,
    "attention_output": AttentionOutput,
    "attention_mse": AttentionMSE,
    "aligner": HeadAligner,
    "minilm": MiniLM,
    "affinity": Affinity,
    "norm_direction": NormDirection,
    "contrastive": Contrastive,
    "acam": AdaptiveMasks,
}
"""Every term of the loss, by its section in `losses`."""


class Losses(Section):
    """The terms of the loss, each with its weight: L = Σ w · L_term."""

    def __getitem__(self, name: str) -> TermConfig:
        """The options of a term."""
        return getattr(self, name)

    @model_validator(mode="after")
    def _every_step_has_a_loss(self) -> Losses:
        counts = [
            section.during or [0.0, 1.0]
            for name, section in self
            if section.weight and name != "variance" and not (name == "shd" and section.every > 1)
        ]
        end = 0.0
        for first, last in sorted(counts):
            end = max(end, last) if first <= end else end
        if end < 1:
            raise ValueError("there are steps without any term; give `denoise` a weight above 0")
        return self


def _sections(terms: dict[str, type[Term]]) -> dict[str, Any]:
    return {name: (term.Config, term.Config(weight=term.default_weight)) for name, term in terms.items()}


LossesConfig: Any = create_model("LossesConfig", __base__=Losses, **_sections(TERMS))
"""`losses` of a distillation."""

TeacherLossesConfig: Any = create_model(
    "TeacherLossesConfig",
    __base__=Losses,
    **_sections({name: term for name, term in TERMS.items() if not term.needs_teacher}),
)
"""`losses` of a model that is trained without a teacher."""


def build_terms(losses: Losses, student: Trace, teacher: Trace | None, seed: int) -> dict[str, Term]:
    """The terms whose weight is not 0, with parameters that follow from the seed.

    Raises:
        ValueError: one cannot be computed for these models; the message begins with its section.
    """
    built: dict[str, Term] = {}
    for name, options in losses:
        kind = TERMS[name]
        if not options.weight or not kind.applies(student):
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                built[name] = kind(options, student, teacher, seed)
            except ValueError as error:
                raise ValueError(f"losses.{name}: {error}") from error
    return built


__all__ = [
    "TERMS",
    "Losses",
    "LossesConfig",
    "SHDConfig",
    "SHDLoss",
    "TeacherLossesConfig",
    "Term",
    "build_terms",
]
