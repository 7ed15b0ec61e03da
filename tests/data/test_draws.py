"""What data need drawn is drawn after everything else, so that it changes no other draw."""

from __future__ import annotations

import torch

from shd_diffusion.training.draws import draw


def test_latent_noise_changes_no_other_draw():
    plain, latent = (draw(3, 11, 64, (4, 8, 8), 1000, 0.1, latent_noise=needed) for needed in (False, True))
    for name in ("noise", "timesteps", "dropped", "flipped"):
        assert torch.equal(getattr(plain, name), getattr(latent, name))
    assert plain.latent_noise is None and latent.latent_noise is not None
    assert not torch.equal(latent.latent_noise, latent.noise)
    assert 0.25 < plain.flipped.float().mean() < 0.75


def test_a_share_has_its_own_part_of_all_draws():
    drawn = draw(3, 11, 8, (4, 2, 2), 1000, 0.1, latent_noise=True)
    share = drawn.take(slice(2, 5), torch.device("cpu"))
    assert share.latent_noise is not None and drawn.latent_noise is not None
    assert torch.equal(share.latent_noise, drawn.latent_noise[2:5])
    assert torch.equal(share.flipped, drawn.flipped[2:5])
