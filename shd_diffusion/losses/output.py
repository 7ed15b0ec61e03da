"""Output KD: the student predicts what the teacher predicts (Hinton et al. 2015, as regression).

Two options of distilled samplers. Errors weighed by timestep: min-SNR (Hang et al. 2023, section 3.4), or truncated
SNR (Salimans and Ho, "Progressive Distillation", ICLR 2022, section 4). And a guided teacher (Meng et al., "On
Distillation of Guided Diffusion Models", CVPR 2023, section 3.1, at one scale): the target is n + w · (c - n) of the
teacher's predictions c and n with and without the condition, so the student needs no second pass to be guided. Where
a sample's condition is dropped, c = n.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shd_diffusion.losses.denoise import squared_error
from shd_diffusion.losses.term import StepOutputs, Term, TermConfig


class OutputConfig(TermConfig):
    """Each sample weighed by min(SNR, `min_snr_gamma`) or, `truncated_snr`, by max(SNR, 1), both of the image's error.

    With a `guidance_scale` w the teacher is guided; sample the student with a scale of 1 then, and set `denoise.weight`
    to 0, since data do not look guided.
    """

    min_snr_gamma: float | None = Field(None, gt=0, allow_inf_nan=False)
    truncated_snr: bool = False
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_weight(self) -> OutputConfig:
        if self.truncated_snr and self.min_snr_gamma is not None:
            raise ValueError(
                "`min_snr_gamma` and `truncated_snr` are two weights of the same error; choose one"
            )
        return self


class OutputDistillation(Term):
    """||ε_student - ε_teacher||², a mean over the channels that are denoised: a predicted variance takes no part."""

    Config: ClassVar[type[TermConfig]] = OutputConfig
    default_weight = 1.0
    reaches_output = True
    config: OutputConfig

    @property
    def needs_null_prediction(self) -> bool:
        return self.config.guidance_scale is not None

    def forward(self, outputs: StepOutputs) -> Tensor:
        target, null, scale = (
            outputs.teacher_prediction,
            outputs.teacher_null_prediction,
            self.config.guidance_scale,
        )
        assert target is not None
        if scale is not None:
            assert null is not None
            exact = torch.promote_types(target.dtype, torch.float32)  # guidance multiplies rounding
            target, null = target.to(exact), null.to(exact)
            target = null + scale * (target - null)
        process, timesteps, weights = outputs.process, outputs.batch.timesteps, None
        if self.config.truncated_snr:
            weights = process.truncated_snr_weight(timesteps)
        elif self.config.min_snr_gamma is not None:
            weights = process.min_snr_weight(timesteps, self.config.min_snr_gamma)
        channels = outputs.channels
        return squared_error(outputs.prediction[:, :channels], target[:, :channels], weights)
