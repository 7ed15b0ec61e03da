"""Output KD: the student predicts what the teacher predicts (Hinton et al. 2015, as regression)."""

from __future__ import annotations

from torch import Tensor

from shd_diffusion.losses.denoise import squared_error
from shd_diffusion.losses.term import StepOutputs, Term


class OutputDistillation(Term):
    """||ε_student - ε_teacher||², a mean over the channels that are denoised: a predicted variance takes no part."""

    default_weight = 1.0
    reaches_output = True

    def forward(self, outputs: StepOutputs) -> Tensor:
        assert outputs.teacher_prediction is not None
        channels = outputs.channels
        return squared_error(outputs.prediction[:, :channels], outputs.teacher_prediction[:, :channels])
