import pytest

from shd_diffusion.losses.weight_schedule import schedule_weight


@pytest.mark.parametrize(
    ("decay", "at"), [("constant", [2, 2, 2, 2]), ("linear", [2, 1.5, 1, 0]), ("cosine", [2, 1.7071, 1, 0])]
)
def test_decays(decay, at):
    weights = [schedule_weight(2.0, step, 100, decay) for step in (0, 25, 50, 100)]
    assert weights == pytest.approx(at, abs=1e-4)
    assert schedule_weight(2.0, 130, 100, decay) == pytest.approx(at[-1], abs=1e-12)
