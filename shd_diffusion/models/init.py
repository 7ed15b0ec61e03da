"""A student that starts from its teacher's weights, as pruned models that are healed (BK-SDM, TinyFusion) do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from shd_diffusion.losses import map_blocks
from shd_diffusion.losses.baselines.captured import enclosing_block, running_blocks
from shd_diffusion.losses.blocks import LayerMap


@dataclass(frozen=True, slots=True)
class Taken:
    """How much of a student comes from its teacher: tensors and scalars, of so many in all."""

    tensors: int
    parameters: int
    all_tensors: int
    all_parameters: int

    def __str__(self) -> str:
        return (
            f"{self.tensors} of {self.all_tensors} tensors, {self.parameters:,} of {self.all_parameters:,} "
            "parameters, come from the teacher"
        )


@torch.no_grad()
def init_from_teacher(student: ModelMixin, teacher: ModelMixin, layer_map: LayerMap = "uniform") -> Taken:
    """Copy into a student the teacher's tensors of the same name and shape, in place.

    A transformer block takes those of the block that it learns from. Tensors of another shape stay new.

    Args:
        student: newly built.
        teacher: of the same family, or there is nothing to take.
        layer_map: see `map_blocks`; a block that it leaves out stays new.

    Raises:
        ValueError: the blocks cannot be mapped, or no tensor fits.
    """
    blocks = _paired_blocks(student, teacher, layer_map)
    theirs = teacher.state_dict()
    taken = []
    parameters = dict(student.named_parameters())
    for name, own in parameters.items():
        source = theirs.get(_source(name, blocks) or "")
        if source is not None and source.shape == own.shape:
            own.copy_(source)
            taken.append(own.numel())
    if not taken:
        raise ValueError(
            f"no tensor of the teacher fits this {type(student).__name__}; its widths are others"
        )
    return Taken(len(taken), sum(taken), len(parameters), sum(own.numel() for own in parameters.values()))


def _paired_blocks(student: ModelMixin, teacher: ModelMixin, layer_map: LayerMap) -> dict[str, str | None]:
    """The teacher's transformer block of each of the student's, by path; None for one that is left out."""
    ours, theirs = (
        {name: block.kind for name, block in running_blocks(model).items()} for model in (student, teacher)
    )
    blocks: dict[str, str | None] = {enclosing_block(name): None for name in ours}
    pairs = map_blocks(theirs, ours, layer_map)
    return blocks | {enclosing_block(name): enclosing_block(by) for name, by in pairs.items()}


def _source(name: str, blocks: dict[str, str | None]) -> str | None:
    """The teacher's name of one of the student's tensors; None where its block learns from none."""
    path = name
    while path := path.rpartition(".")[0]:
        if path in blocks:
            block = blocks[path]
            return None if block is None else block + name.removeprefix(path)
    return name
