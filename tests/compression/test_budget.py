"""The shape for a budget: what every part loses and costs, against models that are built, and what is chosen."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from calibration import batches_of, dit_batches, random_dit, run_dit, run_family
from diffusers import UNet2DModel
from families import FAMILIES, output
from small_models import small_dit
from torch import nn

from shd_diffusion.attention import attention_blocks
from shd_diffusion.compression import compress, costs
from shd_diffusion.compression.attention import HeadOptions, head_losses, squeeze_attention
from shd_diffusion.compression.budget import Budget, parse_budget, plan_shape
from shd_diffusion.compression.costs import cost_of, measure_costs
from shd_diffusion.compression.depth import block_list, removable_blocks
from shd_diffusion.compression.feed_forward import neuron_losses, squeeze_feed_forward
from shd_diffusion.compression.importance import measure_importance, possible_counts
from shd_diffusion.compression.walk import copy_sharing, passes, walk_beside
from shd_diffusion.errors import UserError
from shd_diffusion.models.layouts import feed_forwards, head_layout
from shd_diffusion.models.squeezed import cut_heads, cut_neurons, first_heads, shape

OPTIONS = HeadOptions()


def cut_to(model: nn.Module, counts: dict[str, int]) -> nn.Module:
    """A copy of these shapes, whatever it computes."""
    smaller, heads = copy.deepcopy(model), attention_blocks(model)
    for name, count in counts.items():
        if name in heads:
            cut_heads(smaller, name, first_heads(head_layout(smaller, name), count))
        else:
            cut_neurons(smaller, name, torch.arange(count))
    return smaller


# --- what is lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "sd3", "flux2", "krea2"])
def test_the_losses_of_all_counts_are_those_of_squeezing_to_each(name):
    """Where a squeeze fits the output layers alone; where it also refits values, it may only lose less."""
    family = FAMILIES[name]
    teacher = family.build()
    batches, counts = batches_of(family), possible_counts(teacher, OPTIONS)
    first = {name: counts[name] for name in list(counts)[:1] + list(counts)[-1:]}
    walker = copy_sharing(teacher)
    runs = passes(teacher, batches, run_family), passes(walker, batches, run_family)
    with torch.no_grad():
        for part, calls, targets in walk_beside(teacher, walker, {name: name for name in first}, *runs):
            before = {key: value.clone() for key, value in walker.state_dict().items()}
            some = first[part][:: max(1, len(first[part]) // 2)][:2]
            if part in feed_forwards(teacher):
                (target,) = targets.values()
                losses = neuron_losses(walker, part, some, calls, target)
            else:
                losses = head_losses(walker, part, some, calls, targets, OPTIONS)
            assert list(losses) == list(some)
            torch.testing.assert_close(dict(walker.state_dict()), before, rtol=0, atol=0)
            for count, lost in losses.items():
                smaller = copy_sharing(teacher, part.rpartition(".")[0])
                own = [copy.copy(call) for call in calls]
                if part in feed_forwards(teacher):
                    _, fitted = squeeze_feed_forward(smaller, part, count, own, target)
                else:
                    _, _, fitted = squeeze_attention(smaller, part, count, own, targets, OPTIONS)
                assert fitted <= lost * (1 + 1e-6) + 1e-8  # neurons' ridge counts in the row of removals
                if part in attention_blocks(teacher):
                    layout = head_layout(teacher, part)
                    if len(layout.outputs) > 1 or layout.sharing > 1:
                        assert lost == pytest.approx(fitted, rel=1e-6)
                elif name == "dit":
                    assert lost == pytest.approx(fitted, rel=1e-2, abs=1e-5)


def test_importance_is_what_the_output_loses_by_one_part_alone():
    teacher, batches = random_dit(4, layers=3), dit_batches(2)
    counts = {"transformer_blocks.0.attn1": [3, 2, 1], "transformer_blocks.1.ff": [96, 64, 16]}
    blocks = removable_blocks(teacher)
    assert blocks == [f"transformer_blocks.{index}" for index in range(3)]
    found = measure_importance(teacher, batches, run_dit, counts, blocks, OPTIONS)
    heads = compress(teacher, batches, run_dit, heads={"transformer_blocks.0.attn1": 2})
    neurons = compress(teacher, batches, run_dit, neurons={"transformer_blocks.1.ff": 64})
    assert found.parts["transformer_blocks.0.attn1"][2] == pytest.approx(heads.lost, rel=1e-3)
    assert found.parts["transformer_blocks.1.ff"][64] == pytest.approx(neurons.lost, rel=1e-3)
    for of_part in found.parts.values():
        assert all(more < fewer for more, fewer in pairwise(of_part.values()))
    for block in blocks:
        left = compress(teacher, batches, run_dit, blocks=[name for name in blocks if name != block])
        assert [part.name for part in left.parts] == [block]
        assert found.blocks[block] == pytest.approx(left.lost, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "removable"),
    [
        ("dit", {}, 2),
        ("sd3", {"num_layers": 3, "dual_attention_layers": ()}, 2),  # the last block has one stream
        ("hunyuan-dit", {"num_layers": 4}, 0),  # later blocks take in what earlier ones put out
        ("unet2d-condition", {}, 0),
        ("flux", {}, 0),
        ("pixart", {}, 0),  # has one block
    ],
)
def test_blocks_that_can_leave_leave_a_model_that_loads(name, changes, removable, tmp_path):
    family = FAMILIES[name]
    family = replace(family, arguments={**family.arguments, **changes})
    teacher = family.build()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    blocks = removable_blocks(teacher)
    assert len(blocks) == removable
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    if blocks:
        found = compress(teacher, batches_of(family), run_family, blocks=len(block_list(teacher)[1]) - 1)
        assert type(found.model) is type(teacher)
        found.model.save_pretrained(tmp_path)
        loaded = type(teacher).from_pretrained(tmp_path).eval()
        draw = family.draw(9)
        torch.testing.assert_close(output(loaded(**draw)), output(found.model(**draw)), rtol=0, atol=0)


def test_counts_go_in_sixteenths_and_are_those_that_can_be_had():
    counts = possible_counts(small_dit(12), OPTIONS)
    assert counts["transformer_blocks.0.attn1"] == list(range(11, 0, -1))
    assert counts["transformer_blocks.0.ff"] == [24 * step for step in range(15, 0, -1)]
    shared = FAMILIES["krea2"].build()
    for name, of_part in possible_counts(shared, OPTIONS).items():
        if name in attention_blocks(shared):
            for count in of_part:
                cut = cut_to(shared, {name: count})  # raises for others
                assert shape(cut)[name] == count


# --- what is saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dit", "mdtv2", "unet2d-condition", "sd3", "flux", "flux2", "krea2", "sana"]
)
@pytest.mark.parametrize("unit", ["parameters", "macs"])
def test_what_parts_save_adds_up_to_what_a_smaller_model_saves(name, unit):
    family = FAMILIES[name]
    model, inputs = family.build(), family.draw(1)
    counts = possible_counts(model, OPTIONS)
    found = measure_costs(model, unit, counts, [], lambda: model(**inputs))
    for place in (0, -1):
        wanted = {name: of_part[place] for name, of_part in counts.items()}
        smaller = cut_to(model, wanted)
        with torch.no_grad():
            left = cost_of(smaller, unit, lambda smaller=smaller: smaller(**inputs))
        saved = sum(found.saved[name][count] for name, count in wanted.items())
        assert found.total - saved == pytest.approx(left, rel=1e-12)
    if unit == "parameters":
        assert found.total == sum(parameter.numel() for parameter in model.parameters())


def test_multiply_adds_of_a_transformer_are_those_of_its_formula():
    model, (batch,) = random_dit(4), dit_batches(1, 1)
    counts, blocks = possible_counts(model, OPTIONS), ["transformer_blocks.0", "transformer_blocks.1"]
    found = measure_costs(model, "macs", counts, blocks, lambda: run_dit(model, *batch))
    tokens, width, head = 16, 32, 8
    a_head = 4 * tokens * width * head + 2 * tokens**2 * head  # four projections, logits and mixed values
    assert found.saved["transformer_blocks.0.attn1"] == {n: (4 - n) * a_head for n in (3, 2, 1)}
    assert found.saved["transformer_blocks.1.ff"][64] == 64 * 2 * tokens * width
    conditions = found.blocks["transformer_blocks.0"] - 4 * a_head - 128 * 2 * tokens * width
    assert 0 < conditions < 0.5 * found.blocks["transformer_blocks.0"]


def test_equal_blocks_are_timed_once_and_less_never_saves_less(monkeypatch):
    draw, timed = np.random.default_rng(0), []

    def seconds(module: nn.Module, calls: Any) -> float:
        timed.append(module)
        return sum(part.numel() for part in module.parameters()) * (1 + 0.3 * draw.normal())

    monkeypatch.setitem(costs.MEASURES, "latency", seconds)
    model, (batch,) = random_dit(4, layers=3), dit_batches(1, 1)
    counts = possible_counts(model, OPTIONS)
    names = [f"transformer_blocks.{index}" for index in range(3)]
    found = measure_costs(model, "latency", counts, names, lambda: run_dit(model, *batch))
    assert len(timed) == 1 + 3 + 15 + 1  # the block, with fewer heads, with fewer neurons; the model
    assert len(set(found.blocks.values())) == 1
    for of_part in found.saved.values():
        saved = [of_part[count] for count in sorted(of_part, reverse=True)]
        assert saved[0] >= 0 and all(less <= more for less, more in pairwise(saved))


# --- the choice ---------------------------------------------------------------------------------------------


def test_a_plan_takes_first_what_doubles_others_and_is_what_comes_out():
    teacher = random_dit(4, layers=3)
    block = teacher.transformer_blocks[1]
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        for each in (layer.weight, layer.bias):
            by_head = each.data.unflatten(0, (4, 8))
            by_head[2:] = by_head[:2].clone()
    first = block.ff.net[0].proj
    for each in (first.weight, first.bias):
        each.data[64:] = each.data[:64]
    batches = dit_batches(4, 16)
    one = tuple(each[:1] for each in batches[0])
    plan = plan_shape(teacher, batches, run_dit, Budget("macs", 0.85), one)
    assert {(part.name, part.keeps) for part in plan.parts} == {
        ("transformer_blocks.1.attn1", 2),
        ("transformer_blocks.1.ff", 64),
    }
    assert plan.blocks is None and plan.after <= 0.85 * plan.before and plan.lost < 1e-5

    plan = plan_shape(teacher, batches, run_dit, Budget("parameters", 0.4), one)
    found = compress(teacher, batches, run_dit, **plan.arguments)
    assert plan.before == sum(parameter.numel() for parameter in teacher.parameters())
    assert plan.after == sum(parameter.numel() for parameter in found.model.parameters())
    assert plan.after <= 0.4 * plan.before
    assert any(part.what == "block" for part in plan.parts) and len(plan.blocks) < 3
    planned = {(part.name, part.what, part.keeps) for part in plan.parts}
    assert planned == {(part.name, part.what, part.after) for part in found.parts}


def test_a_block_that_cannot_leave_stays_in_the_plan():
    family = FAMILIES["sd3"]
    arguments = {**family.arguments, "num_layers": 3, "dual_attention_layers": ()}
    teacher = replace(family, arguments=arguments).build()
    batches = batches_of(family)
    with pytest.raises(ValueError, match="the least that can be had is parameters=") as raised:
        plan_shape(teacher, batches, run_family, Budget("parameters", 0.01), batches[0])
    least = float(str(raised.value).rpartition("=")[2])
    plan = plan_shape(teacher, batches, run_family, Budget("parameters", least), batches[0])
    assert "transformer_blocks.2" in plan.blocks
    found = compress(teacher, batches, run_family, **plan.arguments)
    assert plan.after == sum(parameter.numel() for parameter in found.model.parameters())


def test_what_cannot_be_had_says_the_least_that_can():
    teacher, batches = random_dit(4), dit_batches(1)
    one = tuple(each[:1] for each in batches[0])
    with pytest.raises(ValueError, match=r"the least that can be had is macs=0\.\d+$") as raised:
        plan_shape(teacher, batches, run_dit, Budget("macs", 0.01), one)
    least = float(str(raised.value).rpartition("=")[2])
    plan = plan_shape(teacher, batches, run_dit, Budget("macs", least), one)
    assert least - 0.001 < plan.after / plan.before <= least


def test_all_of_the_cost_leaves_all_as_it_is():
    teacher, (batch,) = random_dit(4), dit_batches(1)
    teacher.transformer_blocks[0].ff.net[0].proj.weight.data[64:] = 0  # what could leave for nothing
    plan = plan_shape(teacher, [batch], run_dit, Budget("macs", 1), tuple(each[:1] for each in batch))
    assert plan.parts == () and plan.before == plan.after and plan.lost == 0
    found = compress(teacher, [batch], run_dit, **plan.arguments)
    assert type(found.model) is type(teacher)
    torch.testing.assert_close(dict(found.model.state_dict()), dict(teacher.state_dict()), rtol=0, atol=0)


def test_a_cost_of_which_nothing_is_saved_is_refused(monkeypatch):
    teacher, (batch,) = random_dit(4, layers=1), dit_batches(1, 1)
    monkeypatch.setitem(costs.MEASURES, "latency", lambda module, calls: 1.0)
    with pytest.raises(ValueError, match="nothing that could leave saves seconds of a denoiser call"):
        plan_shape(teacher, [batch], run_dit, Budget("latency", 0.5), batch)
    convolutions = UNet2DModel(
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(32,),
        add_attention=False,
    )
    with pytest.raises(ValueError, match="UNet2DModel has no heads, neurons or blocks that could leave"):
        plan_shape(convolutions, [batch], run_dit, Budget("latency", 0.5), batch)


def test_a_class_that_cannot_be_saved_is_refused_first():
    family = FAMILIES["transformer2d"]
    batches = batches_of(family, (1,))
    with pytest.raises(ValueError, match="loads a Transformer2DModel as another class"):
        plan_shape(family.build(), batches, run_family, Budget("macs", 0.9), batches[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops=0.5", "no budget is counted in `flops`; known here: parameters, macs, latency"),
        ("mac=0.5", "did you mean `macs`"),
        ("macs", "give a share of the teacher's above 0 and up to 1"),
        ("macs=1.01", "above 0 and up to 1, such as macs=0.5"),
        ("latency=half", "such as latency=0.5"),
        ("parameters=nan", "above 0 and up to 1"),
    ],
)
def test_a_budget_that_is_none_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_budget(text)
    assert "\n" not in str(raised.value)
    assert parse_budget("latency=0.7") == Budget("latency", 0.7)
