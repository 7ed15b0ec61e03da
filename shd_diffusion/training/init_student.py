"""A student that starts from its teacher's weights, as pruned models that are healed (BK-SDM, TinyFusion) do."""

from __future__ import annotations

import torch
from diffusers import ModelMixin

from shd_diffusion.attention.blocks import enclosing_block
from shd_diffusion.losses.choice import choose_pairs
from shd_diffusion.losses.layer_map import LayerMap
from shd_diffusion.losses.term import map_modules
from shd_diffusion.models.trace import Trace


@torch.no_grad()
def init_from_teacher(
    student: ModelMixin,
    teacher: ModelMixin,
    student_trace: Trace,
    teacher_trace: Trace,
    layer_map: LayerMap = "uniform",
) -> str:
    """Copy into a student the teacher's tensors of the same name and shape, in place.

    A transformer block takes those of the block that it learns from. Tensors of another shape stay new.

    Args:
        student: newly built.
        teacher: of the same family, or there is nothing to take.
        student_trace: tells the student's blocks.
        teacher_trace: tells the teacher's.
        layer_map: see `map_blocks`; a block that it leaves out stays new.

    Returns:
        How much was taken, in words.

    Raises:
        ValueError: the blocks cannot be mapped, or no tensor fits.
    """
    blocks = paired_blocks(student_trace, teacher_trace, layer_map)
    teacher_tensors = teacher.state_dict()
    parameters = dict(student.named_parameters())
    taken = []
    for name, parameter in parameters.items():
        source = teacher_tensors.get(_source(name, blocks) or "")
        if source is not None and source.shape == parameter.shape:
            parameter.copy_(source)
            taken.append(parameter.numel())
    if not taken:
        raise ValueError(
            f"no tensor of the teacher fits this {type(student).__name__}; its widths are others"
        )
    scalars = sum(parameter.numel() for parameter in parameters.values())
    return (
        f"{len(taken)} of {len(parameters)} tensors, {sum(taken):,} of {scalars:,} parameters, "
        "come from the teacher"
    )


def paired_blocks(student: Trace, teacher: Trace, layer_map: LayerMap) -> dict[str, str | None]:
    """The teacher's transformer block of each of the student's, by path; None for one that is left out."""
    blocks: dict[str, str | None] = {enclosing_block(name): None for name in student.records}
    return blocks | map_modules(choose_pairs(teacher.kinds, student.kinds, layer_map), enclosing_block)


def _source(name: str, blocks: dict[str, str | None]) -> str | None:
    """The teacher's name of one of the student's tensors; None where its block learns from none."""
    path = name
    while path := path.rpartition(".")[0]:
        if path in blocks:
            block = blocks[path]
            return None if block is None else block + name.removeprefix(path)
    return name
