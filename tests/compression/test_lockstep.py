import threading

import pytest
import torch
from torch import nn

from shd_diffusion.compression.lockstep import Lockstep


def chain(count: int = 3) -> nn.Sequential:
    """Layers that add 1, 2, ..."""
    layers = [nn.Linear(1, 1) for _ in range(count)]
    for index, layer in enumerate(layers):
        nn.init.ones_(layer.weight)
        nn.init.constant_(layer.bias, index + 1)
    return nn.Sequential(*layers)


def test_passes_stand_before_the_same_module_and_go_on_with_what_it_has_become():
    model, results = chain(), []
    inputs = [torch.full((2, 1), float(value)) for value in (0, 10)]
    passes = [lambda x=x: results.append(model(x)) for x in inputs]
    seen = []
    with Lockstep(model, ["1", "2"], passes) as walk:
        while calls := walk.advance():
            seen.append((calls[0].name, [call.args[0][0].item() for call in calls]))
            if calls[0].name == "1":
                model[1].bias.data.fill_(100)
                calls[0].args = (calls[0].args[0] + 0.5,)
                assert model(torch.zeros(1, 1)).item() == 104  # whoever is no pass is not stopped
    assert seen == [("1", [1, 11]), ("2", [101.5, 111])]
    assert [result[0].item() for result in results] == [104.5, 114]
    assert not any(result.requires_grad for result in results)
    assert not model[1]._forward_pre_hooks


def test_an_error_in_the_model_reaches_the_caller_and_no_pass_is_left_behind():
    model, before = chain(), threading.active_count()
    passes = [lambda: model(torch.zeros(1, 1)), lambda: model(torch.zeros(1, 7))]
    with pytest.raises(RuntimeError, match="shapes"), Lockstep(model, ["0", "2"], passes) as walk:
        walk.advance()
        walk.advance()
    assert threading.active_count() == before


def test_a_machine_without_more_threads_says_what_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before, start = chain(), threading.active_count(), threading.Thread.start

    def third(self: threading.Thread) -> None:
        if threading.active_count() >= before + 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", third)
    passes = [lambda: model(torch.zeros(1, 1))] * 3
    with pytest.raises(ValueError, match=r"new thread.*fewer images"), Lockstep(model, ["1"], passes) as walk:
        walk.advance()
    assert threading.active_count() == before


def test_a_walk_that_is_left_ends_its_passes():
    model, before, results = chain(), threading.active_count(), []
    with Lockstep(model, ["1"], [lambda: results.append(model(torch.zeros(1, 1)))] * 3) as walk:
        walk.advance()
        assert threading.active_count() == before + 3
    assert threading.active_count() == before and not results


def test_passes_that_run_different_modules_are_refused():
    model = chain()
    passes = [lambda: model[1](model[0](torch.zeros(1, 1))), lambda: model[2](torch.zeros(1, 1))]
    with pytest.raises(RuntimeError, match="other modules"), Lockstep(model, ["0", "2"], passes) as walk:
        walk.advance()


def test_what_is_noted_of_a_module_is_had_in_order_as_far_as_the_passes_have_to_go():
    model = chain()
    passes = [lambda x=x: model(model(torch.full((1, 1), x))) for x in (0.0, 10.0)]
    watched = {"inputs": ("1", lambda x, _: 2 * x), "outputs": ("1", lambda _, y: y)}
    with Lockstep(model, ["2"], passes, watched) as walk:
        assert [note.item() for note in walk.noted("inputs")] == [2, 22]
        assert [call.args[0].item() for call in walk.advance()] == [
            9,
            19,
        ]  # further on than the notes asked for
        assert [note.item() for note in walk.noted("inputs")] == [14, 34]
        assert [note.item() for note in walk.noted("outputs")] == [3, 13]
        assert not walk.advance() and not walk.advance()  # at their end they stay there
        with pytest.raises(RuntimeError, match="`1` does not run"):
            walk.noted("inputs")
    assert not model[1]._forward_hooks
