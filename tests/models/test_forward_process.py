"""The forward process and its objectives against diffusers' schedulers, in float64, and the papers' formulas."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from shd_diffusion.losses.denoise import squared_error
from shd_diffusion.models.forward_process import (
    DiffusionConfig,
    ForwardProcess,
    differing_settings,
    make_scheduler_of_process,
)
from shd_diffusion.models.teacher import scheduler_for

torch.manual_seed(0)
CLEAN, NOISE = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randn(6, 2, 4, 4, dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 1, 250, 500, 750, 999])
OBJECTIVES = ["epsilon", "v_prediction", "sample", "flow"]
# diffusers computes betas and their products in float32: 1,000 factors, each with a rounding of 6e-8
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def process_of(**settings: object) -> ForwardProcess:
    return ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig.model_validate(settings)))


def scales(process: ForwardProcess, timesteps: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    a, s = process.scales(timesteps, torch.zeros(1, dtype=torch.float64))
    return a.numpy(), s.numpy()


def literal_betas(schedule: str, steps: int) -> np.ndarray:
    factor = 1000 / steps
    match schedule:
        case "linear":
            return np.linspace(1e-4 * factor, 0.02 * factor, steps)
        case "scaled_linear":
            return np.linspace((0.00085 * factor) ** 0.5, (0.012 * factor) ** 0.5, steps) ** 2
    share = np.arange(steps + 1) / steps
    cumulative = np.cos((share + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - cumulative[1:] / cumulative[:-1], 0.999)


# --- noising -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1000, 100])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_scales_are_those_of_the_formulas(schedule: str, steps: int) -> None:
    process = process_of(beta_schedule=schedule, num_train_timesteps=steps)
    cumulative = np.cumprod(1 - literal_betas(schedule, steps))
    a, s = scales(process, torch.arange(steps))
    np.testing.assert_allclose(a, np.sqrt(cumulative), **ROUNDING)
    np.testing.assert_allclose(s, np.sqrt(1 - cumulative), **ROUNDING)
    np.testing.assert_allclose(a**2 + s**2, 1, rtol=1e-14)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noising_and_velocity_are_those_of_diffusers(schedule: str, zero_snr: bool) -> None:
    config = DiffusionConfig(
        objective="v_prediction", beta_schedule=schedule, rescale_betas_zero_snr=zero_snr
    )
    scheduler = make_scheduler_of_process(config)
    process = ForwardProcess.from_scheduler(scheduler)
    expected = scheduler.add_noise(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.noised(CLEAN, NOISE, TIMESTEPS), expected, **ROUNDING)
    velocity = scheduler.get_velocity(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.target(CLEAN, NOISE, TIMESTEPS), velocity, **ROUNDING)
    if zero_snr:  # the last step is noise alone
        torch.testing.assert_close(process.noised(CLEAN, NOISE, TIMESTEPS)[-1], NOISE[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
def test_a_teachers_scheduler_tells_its_process(name: str) -> None:
    scheduler = getattr(diffusers, name)(
        1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
    )
    process = ForwardProcess.from_scheduler(scheduler)
    assert (process.objective, process.num_timesteps) == ("v_prediction", 1000)
    a, s = scales(process, torch.arange(1000))
    cumulative = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(a, np.sqrt(cumulative), **ROUNDING)
    np.testing.assert_allclose(s, np.sqrt(1 - cumulative), **ROUNDING)


def test_trained_betas_are_kept() -> None:
    betas = np.linspace(1e-3, 0.3, 20)
    process = ForwardProcess.from_scheduler(DDPMScheduler(20, trained_betas=betas))
    np.testing.assert_allclose(scales(process, torch.arange(20))[0] ** 2, np.cumprod(1 - betas), rtol=1e-6)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(1000, shift=3.0),
        diffusers.UniPCMultistepScheduler(
            1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ],
    ids=["Euler", "UniPC"],
)
def test_a_flow_is_noised_as_its_sampler_does(scheduler: object) -> None:
    process = ForwardProcess.from_scheduler(scheduler)
    assert (process.objective, process.shift, process.num_timesteps) == ("flow", 3.0, 1000)
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.double()
    a, s = scales(process, timesteps)
    # UniPC rounds its timesteps down to whole numbers
    np.testing.assert_allclose(s, scheduler.sigmas[: len(s)].double(), rtol=0, atol=1.01e-3)
    np.testing.assert_allclose(a, 1 - s, rtol=0, atol=1e-15)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        np.testing.assert_allclose(s, scheduler.sigmas[: len(s)].double(), rtol=1e-6)
        noised = process.noised(CLEAN[:5], NOISE[:5], timesteps[:5])
        expected = scheduler.scale_noise(CLEAN[:5], scheduler.timesteps[:5], NOISE[:5])
        torch.testing.assert_close(noised, expected, **ROUNDING)


def test_the_shares_of_a_schedule() -> None:
    shares = torch.tensor([0.0, 0.25, 0.5, 0.9999], dtype=torch.float64)
    assert process_of().timesteps(shares).tolist() == [0, 250, 500, 999]
    found = process_of(objective="flow", shift=3.0).timesteps(shares)
    expected = [1000 * 3 * u / (1 + 2 * u) for u in shares.tolist()]  # Esser et al. 2024, eq. 23
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, rel=1e-6)


def test_fewer_steps_end_in_as_much_noise() -> None:
    last = {
        steps: scales(process_of(num_train_timesteps=steps), torch.tensor([-1]))[0].item()
        for steps in (1000, 100)
    }
    assert last[100] <= last[1000] < 0.01
    given = process_of(num_train_timesteps=100, beta_start=1e-4, beta_end=0.02)
    assert scales(given, torch.tensor([-1]))[0].item() == pytest.approx(
        math.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 100))), rel=1e-5
    )


def test_a_scheduler_of_another_kind_of_process_is_refused() -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler samples a process that is neither"):
        ForwardProcess.from_scheduler(diffusers.EDMEulerScheduler())


# --- objectives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_prediction_stands_for_the_image(objective: str) -> None:
    process = process_of(objective=objective)
    noised, target = process.noised(CLEAN, NOISE, TIMESTEPS), process.target(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.clean(noised, target, TIMESTEPS), CLEAN)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_ddim_or_euler_step_with_a_perfect_prediction_gives_the_image(objective: str) -> None:
    """The sampling scheduler that is exported means the same by timestep, noise and objective as training does."""
    process = process_of(objective=objective)
    kind = FlowMatchEulerDiscreteScheduler if objective == "flow" else DDIMScheduler
    sampler = kind.from_config(process.scheduler.config)
    sampler.set_timesteps(1000)
    now, then = sampler.timesteps[600:602]
    noised = process.noised(CLEAN[:1], NOISE[:1], now[None])
    target = process.target(CLEAN[:1], NOISE[:1], now[None])
    moved = sampler.step(target, now, noised).prev_sample
    expected = process.noised(CLEAN[:1], NOISE[:1], then[None])
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_weights_are_those_of_the_paper(objective: str) -> None:
    """min(SNR, γ) on the image's error: over SNR for epsilon, over SNR + 1 for v (Hang et al. 2023, section 3.4)."""
    process, timesteps = process_of(objective=objective), TIMESTEPS[1:]
    a, s = scales(process, timesteps)
    snr = a**2 / s**2
    literal = np.minimum(snr, 5) * {"epsilon": 1 / snr, "sample": 1, "v_prediction": 1 / (snr + 1)}.get(
        objective, s**2
    )
    np.testing.assert_allclose(process.min_snr_weight(timesteps, 5.0).double(), literal.ravel(), rtol=1e-6)


def test_min_snr_weights_have_limits_where_nothing_is_left_of_the_image() -> None:
    last = torch.tensor([999])
    weights = {
        objective: process_of(objective=objective, rescale_betas_zero_snr=True)
        .min_snr_weight(last, 5.0)
        .item()
        for objective in OBJECTIVES[:3]
    }
    assert weights == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}


@pytest.mark.parametrize("kind", ["min_snr", "truncated_snr"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_weight_is_the_same_loss_on_the_image_for_every_objective(objective: str, kind: str) -> None:
    """w · ||prediction error||² = min(SNR, γ) · ||image error||² (Hang et al. 2023, eq. 7); or max(SNR, 1) of it."""
    process = process_of(objective=objective)
    timesteps, clean, noise = TIMESTEPS[1:5], CLEAN[:4], NOISE[:4]
    noised, target = process.noised(clean, noise, timesteps), process.target(clean, noise, timesteps)
    error = 0.01 * torch.randn_like(target)
    image_error = process.clean(noised, target + error, timesteps) - clean
    a, s = process.scales(timesteps, clean)
    snr = (a / s).square().flatten()
    if kind == "min_snr":
        wanted, weights = snr.clamp(max=5.0), process.min_snr_weight(timesteps, 5.0)
    else:
        wanted, weights = snr.clamp(min=1.0), process.truncated_snr_weight(timesteps)
    expected = wanted * image_error.square().flatten(1).mean(1)
    torch.testing.assert_close(
        (weights * error.square().flatten(1).mean(1)).double(), expected, rtol=1e-5, atol=0
    )


def test_weights_count_by_sample() -> None:
    prediction, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert squared_error(prediction, target).item() == pytest.approx(2.5)
    assert squared_error(prediction, target, torch.tensor([1.0, 0.5])).item() == pytest.approx(1.5)
    assert math.isfinite(squared_error(prediction.half(), target.half()).item())


# --- whose process it is -----------------------------------------------------------------------------------------


def test_settings_that_differ_name_both_values() -> None:
    scheduler = DDIMScheduler(1000, beta_schedule="linear", prediction_type="epsilon")
    assert differing_settings(DiffusionConfig(), scheduler) == {}
    assert differing_settings(DiffusionConfig(objective="epsilon", beta_start=1e-4), scheduler) == {}
    config = DiffusionConfig(objective="v_prediction", num_train_timesteps=100, beta_end=0.2)
    assert differing_settings(config, scheduler) == {
        "objective": ("v_prediction", "epsilon"),
        "num_train_timesteps": (100, 1000),
        "beta_end": (0.2, 0.02),
    }
    assert differing_settings(DiffusionConfig(shift=3.0), scheduler) == {"shift": (3.0, None)}


def test_a_config_may_not_say_otherwise_than_the_teacher() -> None:
    scheduler = DDIMScheduler(prediction_type="epsilon")
    assert scheduler_for(DiffusionConfig(objective="epsilon"), scheduler, False) is scheduler
    with pytest.raises(ValueError, match=r"`diffusion\.objective` is 'v_prediction', .* with 'epsilon'"):
        scheduler_for(DiffusionConfig(objective="v_prediction"), scheduler, False)
    alone = scheduler_for(DiffusionConfig(objective="sample"), None, True)
    assert alone.config.prediction_type == "sample" and alone.config.variance_type == "learned_range"


def test_a_shifted_snr_is_the_schedulers_own() -> None:
    """CogView3-Plus' and CogVideoX' betas are those of others, and their products are not."""
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=4.0,
    )
    process = ForwardProcess.from_scheduler(scheduler)
    expected = scheduler.add_noise(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.noised(CLEAN, NOISE, TIMESTEPS), expected, **ROUNDING)
    velocity = scheduler.get_velocity(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.target(CLEAN, NOISE, TIMESTEPS), velocity, **ROUNDING)


def test_a_flow_from_noise_to_images_is_refused() -> None:
    with pytest.raises(ValueError, match="invert_sigmas"):
        ForwardProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_a_scheduler_that_shifts_by_size_leaves_the_shift_to_the_config() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)
    found = scheduler_for(DiffusionConfig(shift=2.2), scheduler, False)
    assert ForwardProcess.from_scheduler(found).shift == 2.2 and scheduler.config.shift == 1.0
    assert ForwardProcess.from_scheduler(scheduler_for(DiffusionConfig(), scheduler, False)).shift == 1.0
    with pytest.raises(ValueError, match="the pipeline was trained with"):
        scheduler_for(DiffusionConfig(num_train_timesteps=500), scheduler, False)
