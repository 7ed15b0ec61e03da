"""A student that starts from its teacher's weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor

from shd_diffusion.losses.layer_map import LayerMap
from shd_diffusion.models.denoiser import null_condition, predict
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.trace import trace
from shd_diffusion.training.init_student import init_from_teacher


def dit(seed: int, blocks: int = 4, heads: int = 2, patch: int = 2) -> ModelMixin:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        num_layers=blocks,
        in_channels=1,
        out_channels=1,
        sample_size=8,
        patch_size=patch,
        num_embeds_ada_norm=10,
    )
    return randomised(model)


def mdtv2(seed: int, blocks: int) -> ModelMixin:
    torch.manual_seed(seed)
    model = MDTv2Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=blocks,
        num_decoder_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return randomised(model)


def randomised(model: ModelMixin) -> ModelMixin:
    """A new model outputs zeros; then any two are the same function."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def output(model: ModelMixin) -> Tensor:
    noised = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return predict(model, noised, torch.tensor([1, 500, 999]), {"class_labels": torch.tensor([0, 9, 10])})


def taken_by(student: ModelMixin, teacher: ModelMixin, layer_map: LayerMap = "uniform") -> tuple[int, ...]:
    """What was taken, out of the sentence that says so: tensors and all of them, parameters and all of them."""
    traces = (trace(model, (1, 8, 8), null_condition(model)) for model in (student, teacher))
    words = init_from_teacher(student, teacher, *traces, layer_map).replace(",", "").split()
    return tuple(int(words[i]) for i in (0, 2, 4, 6))


@pytest.mark.parametrize("build", [dit, mdtv2])
def test_a_student_of_the_same_shape_is_the_teacher(build: Callable[[int, int], ModelMixin]) -> None:
    teacher, student = build(0, 4), build(1, 4)
    assert not torch.allclose(output(student), output(teacher), atol=1e-2)
    taken = taken_by(student, teacher)
    assert torch.equal(output(student), output(teacher))
    tensors = list(student.parameters())
    scalars = sum(tensor.numel() for tensor in tensors)
    assert taken == (len(tensors), len(tensors), scalars, scalars)


@pytest.mark.parametrize(
    ("layer_map", "expected"), [("uniform", (1, 3)), ("last", (2, 3)), ([3, None], (3, None))]
)
def test_a_shallower_student_takes_the_mapped_blocks(layer_map: object, expected: tuple) -> None:
    teacher, student = dit(0, 4), dit(1, 2)
    before = [{k: v.clone() for k, v in block.state_dict().items()} for block in student.transformer_blocks]
    tensors, all_tensors, *_ = taken_by(student, teacher, layer_map)
    for block, index, old in zip(student.transformer_blocks, expected, before, strict=True):
        wanted = old if index is None else teacher.transformer_blocks[index].state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in block.state_dict().items())
    assert torch.equal(student.proj_out_2.weight, teacher.proj_out_2.weight)
    assert (tensors == all_tensors) == (None not in expected)


def test_blocks_are_taken_within_their_stage() -> None:
    teacher, student = mdtv2(0, 8), mdtv2(1, 4)  # 3 in-blocks and 3 out-blocks; 1 and 1
    taken_by(student, teacher)
    for stage, index in (("in_blocks", 2), ("out_blocks", 2), ("decoder_blocks", 0)):
        own, other = getattr(student, stage)[0], getattr(teacher, stage)[index]
        assert torch.equal(own.attn.to_q.weight, other.attn.to_q.weight)


def test_tensors_of_another_shape_stay_new() -> None:
    teacher, student = dit(0, 2, heads=4), dit(1, 2, heads=2)
    before = {name: value.clone() for name, value in student.named_parameters()}
    tensors, all_tensors, *_ = taken_by(student, teacher)
    of_teacher = dict(teacher.named_parameters())
    fits = {name for name, value in before.items() if of_teacher[name].shape == value.shape}
    assert fits and tensors == len(fits) < all_tensors
    for name, value in student.named_parameters():
        assert torch.equal(value, of_teacher[name] if name in fits else before[name])


def test_nothing_to_take_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tensor of the teacher fits"):
        taken_by(mdtv2(0, 4), dit(0, 1, heads=5, patch=4))
