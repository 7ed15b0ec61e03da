"""Which teacher block each student block learns from (docs/method.md section 6)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Literal, TypeAlias

from shd_diffusion.attention.records import Kind

LayerMap: TypeAlias = Literal["uniform", "last", "first"] | Sequence[int | None] | Mapping[str, str]


def map_blocks(
    teacher: Mapping[str, Kind], student: Mapping[str, Kind], layer_map: LayerMap = "uniform"
) -> dict[str, str]:
    """The teacher block of each student block, by name; blocks meet their own kind only.

    Self-attention is compared with self-attention, cross with cross, joint with joint. Where one module leaves several
    records (`<name>:context`), the others follow its first one, like to like.

    Args:
        teacher: kinds of the teacher's blocks by name, in execution order.
        student: the same for the student.
        layer_map: `uniform` spreads t(l) = ceil((l + 1)·L_T / L_S) - 1, `last` and `first` take so many of
            the teacher's blocks, each within the finest stages that both models have; a list gives t(l) for each
            student block of a kind, None to leave the block out; a mapping gives the pairs by name.

    Raises:
        ValueError: a kind that the teacher lacks, an unknown name or index, or a list of another length.
    """
    if isinstance(layer_map, Mapping):
        for name, by in layer_map.items():
            if name not in student or by not in teacher:
                raise ValueError(f"layer map {name!r}: {by!r} names no pair of captured blocks")
            if _stream(name, student) != _stream(by, teacher):
                raise ValueError(f"layer map {name!r}: {by!r} pairs attention of different kinds")
        return dict(layer_map)
    pairs: dict[str, str] = {}
    level = _common_level(teacher, student) if isinstance(layer_map, str) else None

    def group(name: str, kinds: Mapping[str, Kind]) -> tuple[Kind, str, str]:
        return (*_stream(name, kinds), "" if level is None else _stage(name, level))

    of_blocks = [[name for name in kinds if ":" not in name] for kinds in (student, teacher)]
    for stream in dict.fromkeys(group(name, student) for name in of_blocks[0]):
        of_student = [name for name in of_blocks[0] if group(name, student) == stream]
        of_teacher = [name for name in of_blocks[1] if group(name, teacher) == stream]
        for name, index in zip(
            of_student, _indices(len(of_teacher), len(of_student), layer_map), strict=True
        ):
            if index is None:
                continue
            if not of_teacher:
                raise ValueError(f"{name}: the teacher has no {stream[0]}-attention that can be captured")
            if not 0 <= index < len(of_teacher):
                raise ValueError(
                    f"{name}: no {stream[0]}-attention block {index} among the teacher's {len(of_teacher)}"
                )
            pairs[name] = of_teacher[index]
    for name in student:
        block, _, stream_of_block = name.partition(":")
        by = f"{pairs.get(block)}:{stream_of_block}"
        if stream_of_block and by in teacher:
            pairs[name] = by
    return {name: pairs[name] for name in student if name in pairs}


def _stream(name: str, kinds: Mapping[str, Kind]) -> tuple[Kind, str]:
    return kinds[name], name.partition(":")[2]


def _common_level(teacher: Collection[str], student: Collection[str]) -> int | None:
    """The finest level at which both have the same stages, in the parts that the student has; None if there is none.

    A UNet meets its teacher resolution by resolution, whatever the depth within each, and without a middle block too.
    """
    parts = {_stage(name, 0) for name in student}
    teacher = [name for name in teacher if _stage(name, 0) in parts]
    deepest = max((len(_lists(name)) for name in student), default=0)
    return next(
        (
            level
            for level in range(deepest, -1, -1)
            if {_stage(name, level) for name in student} == {_stage(name, level) for name in teacher}
        ),
        None,
    )


def _stage(name: str, level: int) -> str:
    """The list of modules that a block lies in, at most so many lists deep; at level 0 the model's part around it."""
    lists = _lists(name)[:level]
    return lists[-1] if lists else name.rpartition(".")[0].partition(".")[0]


def _lists(name: str) -> list[str]:
    """The lists around a block: those of `up_blocks.1.attentions.0.attn1` are `up_blocks`, `up_blocks.1.attentions`."""
    parts = name.partition(":")[0].split(".")
    return [".".join(parts[:place]) for place, part in enumerate(parts) if part.isdigit()]


def _indices(teacher: int, student: int, layer_map: LayerMap) -> Sequence[int | None]:
    match layer_map:
        case "uniform":
            return [ceil((block + 1) * teacher / student) - 1 for block in range(student)]
        case "last":
            return range(teacher - student, teacher)
        case "first":
            return range(student)
    assert isinstance(layer_map, Sequence)
    if len(layer_map) != student:
        raise ValueError(
            f"a layer map of {len(layer_map)} entries does not fit {student} student blocks of a kind"
        )
    return [entry for entry in layer_map if not isinstance(entry, str)]
