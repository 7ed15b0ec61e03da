"""Schedulers by name, and what is wrong with them before a training."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import DummyObject
from small_models import small_dit

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.sampling import ClassConditionalPipeline, check_sampling, make_scheduler, sample_images
from shd_diffusion.sampling.schedulers import (
    check_sampling_by_prompt,
    own_scheduler,
    scheduler_protocol,
    usual_scheduler,
)

DIFFUSION, FLOW = DDPMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()


class NeedsALibrary(metaclass=DummyObject):
    """As diffusers has a class whose library is missing."""

    _backends = ["torchsde_of_nobody"]  # noqa: RUF012 -- diffusers' own


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("NoScheduler", {}, "`NoScheduler` is no scheduler class"),
        ("AutoencoderKL", {}, "`AutoencoderKL` is no scheduler class"),
        ("DDIMScheduler", {"etta": 1}, "takes no argument `etta`"),
        ("DDIMScheduler", {"steps_offset": "1"}, "takes no steps_offset='1'; its default is 0"),
        ("DDIMScheduler", {"set_alpha_to_one": "no"}, "takes no set_alpha_to_one='no'; its default is True"),
        ("DDIMScheduler", {"steps_offset": True}, "takes no steps_offset=True"),
        ("DDIMScheduler", {"beta_schedule": "none"}, "`DDIMScheduler` refuses its arguments"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "predicts `epsilon`.*not sample by but `sample`"),
        ("FlowMatchEulerDiscreteScheduler", {}, "predicts `epsilon`.*take DDPMScheduler or its kin"),
        ("EDMEulerScheduler", {}, "neither a diffusion by betas nor a flow"),
    ],
)
def test_what_cannot_sample_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, arguments, DIFFUSION)
    with pytest.raises(UserError, match=rf"^key `sample.scheduler`: .*{message}"):
        check_sampling(SampleConfig(scheduler=name, scheduler_arguments=arguments), DIFFUSION)


def test_a_scheduler_whose_library_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = diffusers.utils.import_utils.BACKENDS_MAPPING
    monkeypatch.setitem(backends, "torchsde_of_nobody", (lambda: False, "{0} lacks it"))
    monkeypatch.setattr(diffusers, "NeedsALibrary", NeedsALibrary, raising=False)
    with pytest.raises(UserError, match=r"^key `sample\.scheduler`: NeedsALibrary lacks it"):
        check_sampling(SampleConfig(scheduler="NeedsALibrary"), DIFFUSION)


def test_flows_and_diffusions_keep_apart() -> None:
    with pytest.raises(ValueError, match="predicts `flow`, which `DDIMScheduler` does not sample by"):
        make_scheduler("DDIMScheduler", {}, FLOW)
    solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert make_scheduler("DPMSolverMultistepScheduler", solver, FLOW).config["use_flow_sigmas"]
    with pytest.raises(ValueError, match="predicts `epsilon`"):
        make_scheduler("DPMSolverMultistepScheduler", solver, DIFFUSION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 5000}, "key `sample.num_inference_steps` is 5000: `DDIMScheduler` cannot"),
        ({"guidance_interval": [900, 1]}, r"key `sample.guidance_interval` is \[900, 1\].*write \[1, 900\]"),
        (
            {"scheduler": "RePaintScheduler"},
            "`RePaintScheduler` cannot sample so .*original_image.*`sample.scheduler_arguments`",
        ),
    ],
)
def test_what_would_fail_after_training_is_refused_before(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_sampling(SampleConfig(**options), DIFFUSION)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "trained_with", "message"),
    [
        ({"num_inference_steps": 5000}, DIFFUSION, "is 5000: `DDPMScheduler` cannot sample so"),
        ({"scheduler": "DDIMScheduler"}, FLOW, "key `sample.scheduler`: the model predicts `flow`"),
        ({"pipeline_arguments": {"sigmas": [1.0, 0.5]}}, DIFFUSION, "`DDPMScheduler` cannot .*sigmas"),
        ({"pipeline_arguments": {"timesteps": [3, 5]}}, DIFFUSION, "cannot sample so .*descending"),
    ],
)
def test_what_a_pipeline_by_prompt_would_refuse(
    options: dict[str, Any], trained_with: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_sampling_by_prompt(SampleConfig(**options), trained_with)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "trained_with"),
    [
        ({}, DIFFUSION),
        ({"pipeline_arguments": {"timesteps": [5, 3]}}, DIFFUSION),
        ({"pipeline_arguments": {"sigmas": [1.0, 0.5]}}, FLOW),
        ({}, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    ],
)
def test_what_a_pipeline_by_prompt_can_sample_with_passes(options: dict[str, Any], trained_with: Any) -> None:
    """As `set_timesteps` is called by pipelines of diffusers; the scheduler keeps nothing of the trial."""
    before = trained_with.timesteps.clone()
    assert check_sampling_by_prompt(SampleConfig(**options), trained_with) is trained_with
    assert torch.equal(trained_with.timesteps, before)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "trained_with"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, DIFFUSION),
        ("DDPMScheduler", {"variance_type": "learned_range"}, DIFFUSION),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, DIFFUSION),
        ("EulerAncestralDiscreteScheduler", {}, DIFFUSION),
        ("HeunDiscreteScheduler", {}, DIFFUSION),
        ("PNDMScheduler", {}, DIFFUSION),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, DIFFUSION),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3}, FLOW),
        ("FlowMatchHeunDiscreteScheduler", {}, FLOW),
    ],
)
def test_what_can_sample_passes(scheduler: str, arguments: dict[str, Any], trained_with: Any) -> None:
    check_sampling(SampleConfig(scheduler=scheduler, scheduler_arguments=arguments), trained_with)


def test_an_argument_goes_before_what_is_set_for_a_scheduler() -> None:
    found = make_scheduler("DPMSolverMultistepScheduler", {"variance_type": "learned"}, DIFFUSION)
    assert found.config["variance_type"] == "learned"


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_learned_variance_is_left_out_where_a_scheduler_has_no_use_for_it(scheduler: str) -> None:
    torch.manual_seed(0)
    model = small_dit(2, layers=1, out_channels=2).eval()
    learned = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    images = []
    for trained_with in (DIFFUSION, learned):
        pipeline = ClassConditionalPipeline(model, make_scheduler(scheduler, {}, trained_with))
        pipeline.set_progress_bar_config(disable=True)
        images.append(sample_images(pipeline, range(3), SampleConfig(num_inference_steps=4)))
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("scheduler", "clip", "in_pixels", "clips"),
    [
        (None, None, True, True),
        (None, None, False, False),
        (None, False, True, False),
        ("DDPMScheduler", True, False, True),
        ("DPMSolverMultistepScheduler", None, True, False),
        ("DPMSolverMultistepScheduler", False, True, False),
    ],
)
def test_pixels_are_clipped_unless_the_config_says_otherwise(
    scheduler: str | None, clip: bool | None, in_pixels: bool, clips: bool
) -> None:
    config = SampleConfig(scheduler=scheduler, clip=clip)
    made = usual_scheduler(config, DIFFUSION, in_pixels)
    assert scheduler_protocol(made).get("clip", False) is clips
    assert own_scheduler(SampleConfig(), made) is made
    if scheduler is None:
        asked = own_scheduler(SampleConfig(clip=not clips), made)
        assert asked.config["clip_sample"] is (not clips) and made.config["clip_sample"] is clips
        other = make_scheduler("DPMSolverMultistepScheduler", {}, made)  # keeps what it has no use for
        assert "clip" not in scheduler_protocol(other)


def test_a_clipped_step_never_predicts_an_image_beyond_its_range() -> None:
    """The image behind each of DDIM's last steps is the prediction: 3 without clipping, 1 with it."""
    ends = {}
    for clip in (True, False):
        scheduler = usual_scheduler(SampleConfig(clip=clip), DIFFUSION)
        scheduler.set_timesteps(2)
        image, noise = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)
        alpha = scheduler.alphas_cumprod[scheduler.timesteps[-1]].sqrt()
        ends[clip] = scheduler.step(noise, scheduler.timesteps[-1], alpha * image).prev_sample.item()
    assert ends == {True: pytest.approx(1, rel=1e-5), False: pytest.approx(3, rel=1e-5)}
