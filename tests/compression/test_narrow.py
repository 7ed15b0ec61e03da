"""Narrow students made from their teachers' weights: what must be lossless is, and what cannot be cut is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from calibration import random_dit, run_dit, run_family
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from families import FAMILIES, Family, output
from small_models import small_dit
from torch import nn
from torch.nn.functional import silu

from shd_diffusion.compression.narrow import check_can_be_squeezed_into, squeeze_into
from shd_diffusion.models.layouts import Slice, feed_forwards, head_layout
from shd_diffusion.models.squeezed import shape
from shd_diffusion.models.widths import axes, space_sizes

ANOTHER_WIDTH = {"num_attention_heads": 2, "attention_head_dim": 6}
NARROWER: dict[str, dict[str, Any]] = {
    "dit": {"num_attention_heads": 2},
    "mdtv2": {"num_attention_heads": 2},
    "pixart": {"num_attention_heads": 2, "cross_attention_dim": 16},
    "cogview4": {"num_attention_heads": 2},
    "sd3": {"num_attention_heads": 2, "caption_projection_dim": 16},
    "flux": {"num_attention_heads": 2},
    "chroma": {"num_attention_heads": 2},
    "flux2": {"num_attention_heads": 2},
    "ovis-image": {"num_attention_heads": 2},
    "auraflow": {"num_attention_heads": 2, "caption_projection_dim": 16},
    "qwen-image": {"num_attention_heads": 2},
    "lumina2": {"num_attention_heads": 2, "num_kv_heads": 2, "hidden_size": 12},
    "z-image": {"dim": 16, "n_heads": 2, "n_kv_heads": 2},
    "hunyuan-dit": {"num_attention_heads": 2, "hidden_size": 16},
    "wan": {"num_attention_heads": 2, "ffn_dim": 12},
    "unet2d": {"block_out_channels": (4, 8)},
    "unet2d-condition": {"block_out_channels": (4, 8), "attention_head_dim": 1},
}


HUNYUAN = FAMILIES["hunyuan-dit"]  # of four blocks the last has a skip connection
FAMILIES = FAMILIES | {"hunyuan-dit": replace(HUNYUAN, arguments={**HUNYUAN.arguments, "num_layers": 4})}


def batches_of(family: Family, count: int = 3) -> list[Any]:
    return [(None, None, family.draw(seed)) for seed in range(1, count + 1)]


def narrow(family: Family, changes: dict[str, Any]) -> nn.Module:
    return Family(family.model, {**family.arguments, **changes}, family.inputs, ()).build(seed=3)


@pytest.mark.parametrize("name", NARROWER)
def test_a_student_of_the_teachers_shape_is_the_teacher(name: str) -> None:
    family = FAMILIES[name]
    teacher, student = family.build(), family.build(seed=3)
    expected = output(teacher(**family.draw(7)))
    assert not torch.allclose(output(student(**family.draw(7))), expected, rtol=0.1)
    lost, _ = squeeze_into(student, teacher, batches_of(family, 1), run_family, {})
    torch.testing.assert_close(output(student(**family.draw(7))), expected, rtol=1e-5, atol=1e-6)
    assert lost < 1e-10


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *NARROWER.items(),
        *(pytest.param(name, ANOTHER_WIDTH, id=f"{name}, heads too") for name in ("dit", "mdtv2")),
    ],
)
def test_a_narrow_student_begins_close_to_its_teacher(name: str, changes: dict[str, Any]) -> None:
    family = FAMILIES[name]
    teacher, student = family.build(), narrow(family, changes)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    batches = batches_of(family, 2)
    with torch.no_grad():
        wanted, random = (torch.cat([run_family(m, *batch) for batch in batches]) for m in (teacher, student))
    lost, _ = squeeze_into(student, teacher, batches, run_family, {})
    assert lost < 0.5 * float((wanted - random).square().sum() / wanted.square().sum()) and lost < 0.5
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert not student.training


@pytest.mark.parametrize("name", NARROWER)
def test_what_padding_has_added_leaves_without_loss(name: str) -> None:
    """Every channel of the teacher is there twice, and only one of them is read; half of its heads and neurons go into
    nothing. Its norms are those of the student."""
    family = FAMILIES[name]
    changes = {
        key: tuple(2 * size for size in value) if isinstance(value, tuple) else 2 * value
        for key, value in NARROWER[name].items()
    }
    teacher, original = narrow(family, changes), narrow(family, NARROWER[name])
    with torch.no_grad():
        for model in (teacher, original):
            forget_time(model)
        pad(original, teacher)
    inputs = family.draw(9)
    expected = output(original(**inputs))
    torch.testing.assert_close(output(teacher(**inputs)), expected, rtol=1e-4, atol=1e-5)

    student = narrow(family, NARROWER[name])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_()
        forget_time(student)
    lost, _ = squeeze_into(student, teacher, batches_of(family, 5), run_family, {})
    assert lost < 1e-6  # heads are merged with a ridge of 1e-5


def forget_time(model: nn.Module) -> None:
    """Where the sinusoids of the timestep are others at every width, see nothing of them."""
    for path in ("time_condition_embed.timestep_embedder", "time_embedding"):
        if f"{path}.linear_1" in dict(model.named_modules()):
            model.get_submodule(f"{path}.linear_1").weight.zero_()


def pad(small: nn.Module, big: nn.Module) -> None:
    """Write a model's weights into one of twice its channels, heads and neurons, which then computes the same."""
    spaces, sizes, source, neurons = axes(small), space_sizes(small), small.state_dict(), feed_forwards(small)
    places = list(zip(heads_and_neurons(small), heads_and_neurons(big), strict=True))
    layouts = [head_layout(small, name) for name in shape(small) if name not in neurons]
    normed = {part.layer for each in layouts if each.query_norms for part in (*each.queries, *each.keys)}
    for key, tensor in [*big.state_dict().items(), *big.named_buffers()]:
        if key not in source:
            own = dict(small.named_buffers()).get(key)
            if own is not None and own.shape != tensor.shape:
                tensor.copy_(own.repeat_interleave(2, -1))  # the positions of a DiT
            continue
        value, its = source[key], spaces.get(key, ())
        for dim, axis in enumerate(its):
            if axis is None or value.shape[dim] == tensor.shape[dim]:
                continue
            reads = dim == 1 and key.endswith(".weight") and "embed" not in key.split(".")[-2]
            chunks = value.split([sizes[space] for space in axis.spaces], dim)
            value = torch.cat(
                [  # side by side, so that both are in the same group of a norm
                    torch.stack([chunk, torch.zeros_like(chunk) if reads else chunk], dim + 1).flatten(
                        dim, dim + 1
                    )
                    for chunk in chunks
                ],
                dim,
            )
        if value.shape == tensor.shape:
            tensor.copy_(value)
            continue
        dim = next(d for d in range(value.ndim) if value.shape[d] != tensor.shape[d])
        if "norm" in key:  # over all heads, of which the further ones are the first again
            tensor.copy_(torch.cat([value, value]))
            continue
        tensor.narrow(dim, 0, value.shape[dim]).copy_(value)  # what is by head, such as a table of biases
        for (axis_, own), (_, new) in places:
            if (own.layer, axis_) != (key.rpartition(".")[0], dim):
                continue
            into = tensor.narrow(dim, new.start, new.length)
            into.narrow(dim, 0, own.length).copy_(value.narrow(dim, own.start, own.length))
            further = into.narrow(dim, own.length, new.length - own.length)
            if dim == 1:  # nothing reads the further ones, which stay random
                further.zero_()
            elif own.layer in normed:
                further.copy_(value.narrow(dim, own.start, own.length))


def heads_and_neurons(model: nn.Module) -> list[tuple[int, Slice]]:
    """Where they lie: along which axis of a layer's weight, and which part of it."""
    neurons = feed_forwards(model)
    found = []
    for name in shape(model):
        outputs = (neurons[name].output,) if name in neurons else head_layout(model, name).outputs
        inputs = neurons[name].inputs if name in neurons else head_layout(model, name).inputs
        found += [*((0, part) for part in inputs), *((1, part) for part in outputs)]
    return found


def test_a_shallower_student_has_the_blocks_of_its_layer_map() -> None:
    """As wide as its teacher: blocks alone leave, and the last layer learns to read another block's condition."""
    teacher, student = random_dit(2, 4, 0), random_dit(2, 2, 1)
    batches = [
        (torch.randn(16, 1, 8, 8), torch.randint(1000, (16,)), torch.randint(11, (16,))) for _ in range(4)
    ]
    origins = {"transformer_blocks.0": "transformer_blocks.1", "transformer_blocks.1": "transformer_blocks.3"}
    squeeze_into(student, teacher, batches, run_dit, origins)
    for own, by in origins.items():
        wanted = teacher.get_submodule(by).state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in student.get_submodule(own).state_dict().items())
    assert torch.equal(student.proj_out_2.weight, teacher.proj_out_2.weight)
    conditions = [
        torch.cat(
            [
                silu(model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=torch.float32))
                for _, t, labels in batches
            ]
        ).detach()
        for model in (teacher, student)
    ]
    wanted, found = (m.proj_out_1(c).detach() for m, c in zip((teacher, student), conditions, strict=True))
    features = torch.cat([conditions[1], torch.ones(64, 1)], 1).double().numpy()
    fit = features @ scipy.linalg.lstsq(features, wanted.double().numpy())[0]
    error, least = (np.square(wanted.numpy() - each).sum() for each in (found.numpy(), fit))
    assert least <= error * (1 + 1e-6) and error < 1.001 * least


def test_a_unet_of_shallower_transformers_has_the_blocks_of_its_layer_map() -> None:
    family = FAMILIES["unet2d-condition"]
    teacher, student = narrow(family, {"transformer_layers_per_block": 2}), family.build()
    stages = [name for name, child in student.named_modules() if isinstance(child, Transformer2DModel)]
    origins = {f"{stage}.transformer_blocks.0": f"{stage}.transformer_blocks.1" for stage in stages}
    squeeze_into(student, teacher, batches_of(family, 1), run_family, origins)
    wanted = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        path = next((own for own in origins if name.startswith(f"{own}.")), "")
        assert torch.equal(tensor, wanted[origins[path] + name.removeprefix(path) if path else name])
    assert len(stages) == 4 and len(teacher.mid_block.attentions[0].transformer_blocks) == 2


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda: random_dit(4, 2, 0), lambda: random_dit(2, 2, 0), "has 4 heads, the teacher's 2"),
        (lambda: random_dit(2, 2, 0, 16), lambda: random_dit(2, 2, 0, 24), "make `attention_head_dim` equal"),
        (lambda: random_dit(2, 2, 0), FAMILIES["mdtv2"].build, "take the teacher's class"),
        (lambda: random_dit(2, 1, 0), lambda: random_dit(2, 2, 0), "give it one in `losses.shd.layer_map`"),
        (
            lambda: small_dit(2, out_channels=2),
            lambda: small_dit(4),
            "`proj_out_2.weight` .* all else .* equal",
        ),
        (
            lambda: narrow(
                FAMILIES["lumina2"], {"num_attention_heads": 2, "num_kv_heads": 1, "hidden_size": 12}
            ),
            FAMILIES["lumina2"].build,
            "has 1 keys for its 2 heads; so many of the teacher's 4 have 2",
        ),
        (FAMILIES["sana"].build, FAMILIES["sana"].build, "a SanaTransformer2DModel are not known"),
        (
            lambda: narrow(FAMILIES["pixart"], {"use_additional_conditions": True}),
            lambda: narrow(FAMILIES["pixart"], {"use_additional_conditions": True}),
            "is told sizes .*; set it to `random`, or make the student by `shd-diffusion compress`",
        ),
        (
            FAMILIES["unet added keys"].build,
            FAMILIES["unet added keys"].build,
            "`down_blocks.1.attentions.0` is of class Attention, whose channels are not known",
        ),
        (
            FAMILIES["unet2d"].build,
            lambda: narrow(FAMILIES["unet2d"], {"layers_per_block": 2}),
            "block `down_blocks.0.resnets.0` learns from none of the teacher's; .* keep all 2",
        ),
        (
            lambda: narrow(
                FAMILIES["unet2d-condition"], {"block_out_channels": (8, 12), "attention_head_dim": 2}
            ),
            FAMILIES["unet2d-condition"].build,
            "has heads of width 6, the teacher's 8",
        ),
        (
            lambda: narrow(FAMILIES["sd3"], {"qk_norm": None}),
            FAMILIES["sd3"].build,
            "`qk_norm` is None, the teacher's 'rms_norm': not a smaller model but another",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_can_be_squeezed_into(student(), teacher(), {})


def test_chroma_whose_blocks_have_numbers_keeps_them() -> None:
    family = FAMILIES["chroma"]
    teacher = narrow(family, {"num_single_layers": 2})
    origins = {"single_transformer_blocks.0": "single_transformer_blocks.1"}
    with pytest.raises(
        ValueError, match="tells its blocks apart by their numbers, so none can leave; keep all 2"
    ):
        check_can_be_squeezed_into(family.build(), teacher, origins)
