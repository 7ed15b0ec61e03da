"""A student that starts from what least squares makes of its teacher's weights (`student.init: squeeze`)."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from shd_diffusion.compression.compress import block_plans
from shd_diffusion.compression.narrow import squeeze_into
from shd_diffusion.config import DistillConfig
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.denoiser import predict
from shd_diffusion.progress import announce
from shd_diffusion.squeezing.plan import BlockPlan
from shd_diffusion.training.build import Parts
from shd_diffusion.training.calibration import calibration_batches, in_passes


@torch.no_grad()
def squeeze_student(parts: Parts, accelerator: Accelerator) -> dict[str, BlockPlan]:
    """Squeeze the teacher's weights into the student's, in place: the main process does, the others are told.

    Calibrated on the run's own data, noised as it trains, of steps that it never takes. Every process calls this,
    before anything is sharded.

    Returns:
        In the main process, by block, the plans by which heads merged; nothing elsewhere.

    Raises:
        UserError: least squares has no answer.
    """
    plans: dict[str, BlockPlan] = {}
    config, student = parts.config, parts.model
    assert isinstance(config, DistillConfig) and parts.teacher is not None
    if accelerator.is_main_process:
        images = config.student.init_images
        announce(f"student.init: squeezes the teacher on {images} images")
        device = torch.device("cpu") if config.teacher.device == "cpu" else accelerator.device
        twin = copy.deepcopy(student).to(device)  # a compiled student's twin is not compiled
        teacher = nn.Module.to(copy.deepcopy(parts.teacher.model), device, torch.float32)
        drawn = calibration_batches(config, twin, parts.data, parts.process, images, min(64, images))
        batches = in_passes(drawn, config.train.micro_batch_size or config.train.batch_size)
        try:
            lost, groups = squeeze_into(twin, teacher, batches, predict, parts.origins)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise UserError(
                f"key `student.init`: the teacher cannot be squeezed ({one_line(error)}); see that its weights are "
                "finite, or leave `squeeze` out"
            ) from error
        announce(f"student.init: its prediction differs from the teacher's by {lost:.4f} of its square")
        student.load_state_dict(twin.state_dict())
        plans = block_plans(groups, parts.origins)
    if accelerator.num_processes > 1:
        for tensor in student.state_dict().values():
            tensor.copy_(broadcast(tensor.to(accelerator.device)))
    return plans
