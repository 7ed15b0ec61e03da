"""The forward process and its objectives against diffusers' schedulers and the papers' formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from shd_diffusion.losses.denoising import forward_process, squared_error

from shd_diffusion.config import DiffusionConfig
from shd_diffusion.sampling import make_scheduler

torch.manual_seed(0)
CLEAN, NOISE = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randn(6, 2, 4, 4, dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 1, 250, 500, 750, 999])
OBJECTIVES = ["epsilon", "v_prediction", "sample", "flow"]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noising_and_velocity_are_those_of_diffusers(beta_schedule: str) -> None:
    process = forward_process(DiffusionConfig(objective="v_prediction", beta_schedule=beta_schedule))
    theirs = DDPMScheduler(1000, beta_schedule=beta_schedule)
    expected = theirs.add_noise(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.noised(CLEAN, NOISE, TIMESTEPS), expected, rtol=1e-4, atol=1e-5)
    velocity = theirs.get_velocity(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.target(CLEAN, NOISE, TIMESTEPS), velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_prediction_stands_for_the_image(objective: str) -> None:
    process = forward_process(DiffusionConfig(objective=objective))
    keep = slice(0, 5 if objective == "flow" else 6)  # pure noise holds nothing of the image
    noised, target = process.noised(CLEAN, NOISE, TIMESTEPS), process.target(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(process.clean(noised, target, TIMESTEPS)[keep], CLEAN[keep])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_ddim_or_euler_step_with_a_perfect_prediction_gives_the_image(objective: str) -> None:
    """The sampling scheduler that is exported means the same by timestep, noise and objective as training does."""
    process = forward_process(DiffusionConfig(objective=objective))
    name = "FlowMatchEulerDiscreteScheduler" if objective == "flow" else "DDIMScheduler"
    sampler = make_scheduler(name, {}, process.scheduler)
    sampler.set_timesteps(1000)
    index = torch.tensor([399])
    noised = process.noised(CLEAN[:1], NOISE[:1], index)
    target = process.target(CLEAN[:1], NOISE[:1], index)
    time = sampler.timesteps[torch.isclose(sampler.timesteps.double(), process.times(index).double())]
    assert len(time) == 1
    moved = sampler.step(target, time[0], noised).prev_sample
    torch.testing.assert_close(moved, process.noised(CLEAN[:1], NOISE[:1], index - 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_weight_is_the_same_loss_on_the_image_for_every_objective(objective: str) -> None:
    """w · ||prediction error||² = min(SNR, γ) · ||image error||² (Hang et al. 2023, eq. 7)."""
    process = forward_process(DiffusionConfig(objective=objective))
    timesteps = TIMESTEPS[1:5]
    clean, noise = CLEAN[:4], NOISE[:4]
    noised, target = process.noised(clean, noise, timesteps), process.target(clean, noise, timesteps)
    error = 0.01 * torch.randn_like(target)
    image_error = process.clean(noised, target + error, timesteps) - clean
    snr = (process.signal[timesteps] / process.noise[timesteps]) ** 2
    expected = snr.clamp(max=5.0) * image_error.square().flatten(1).mean(1)
    found = process.min_snr_weight(timesteps, 5.0) * error.square().flatten(1).mean(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_weights_count_by_sample() -> None:
    prediction, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert squared_error(prediction, target).item() == pytest.approx(2.5)
    assert squared_error(prediction, target, torch.tensor([1.0, 0.5])).item() == pytest.approx(1.5)
    assert math.isfinite(squared_error(prediction.half(), target.half()).item())
