"""Which pairs of blocks a term compares: by kind of attention, stream and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from shd_diffusion.attention.records import Kind
from shd_diffusion.losses.layer_map import LayerMap, map_blocks

Stream = Literal["image", "text"]
Kinds: TypeAlias = Mapping[str, Kind]
"""The kind of each attention record of a model, in order of depth."""


def choose_pairs(
    teacher: Kinds,
    student: Kinds,
    layer_map: LayerMap = "uniform",
    kinds: Sequence[Kind] | None = None,
    streams: Sequence[Stream] | None = None,
    after: float = 0.0,
) -> dict[str, str]:
    """The teacher's record of each of the student's that is compared, in order of the student's depth.

    Blocks are mapped as `map_blocks` says, whatever is chosen of them.

    Args:
        kinds: of attention; None for all that both models have.
        streams: of joint attention, the query rows of the image, of the text; None for both.
        after: share in [0, 1) of the student's blocks so chosen that is left out at the start.

    Raises:
        ValueError: they cannot be mapped, or nothing is left; it is said what is missing.
    """
    wanted = _common_kinds(teacher, student) if kinds is None else kinds
    for kind in wanted:
        for model, its in (("student", student), ("teacher", teacher)):
            if kind not in its.values():
                raise ValueError(
                    f"`kinds` names {kind}-attention, of which the {model} has none that can be captured; it has "
                    f"{_listed(its)}"
                )
    of_teacher, of_student = (
        {name: kind for name, kind in its.items() if kind in wanted} for its in (teacher, student)
    )
    pairs = map_blocks(of_teacher, of_student, layer_map)
    if not pairs:
        raise ValueError("no student block learns from a teacher block: the layer map is empty")
    if streams is not None:
        pairs = _of_streams(pairs, student, streams)
    return _later({name: pairs[name] for name in student if name in pairs}, after)


def _common_kinds(teacher: Kinds, student: Kinds) -> list[Kind]:
    common = [kind for kind in dict.fromkeys(student.values()) if kind in teacher.values()]
    if not common:
        raise ValueError(
            "the models have no kind of attention in common that can be captured: the student has "
            f"{_listed(student)}, the teacher {_listed(teacher)}"
        )
    return common


def _listed(kinds: Kinds) -> str:
    return " and ".join(dict.fromkeys(kinds.values())) or "none"


def stream_of(name: str, kind: Kind) -> Stream | None:
    """Whose query rows a record has; None where attention is not joint."""
    if kind != "joint":
        return None
    return "text" if ":" in name else "image"


def _of_streams(pairs: Mapping[str, str], student: Kinds, streams: Sequence[Stream]) -> dict[str, str]:
    found = {name: stream_of(name, student[name]) for name in pairs}
    for stream in streams:
        if stream not in found.values():
            raise ValueError(
                f"`streams` names {stream}, but no joint attention of both models has query rows of it"
            )
    return {name: by for name, by in pairs.items() if found[name] is None or found[name] in streams}


def _later(pairs: Mapping[str, str], after: float) -> dict[str, str]:
    """Without a share of the blocks, however many records each has."""
    blocks = list(dict.fromkeys(name.partition(":")[0] for name in pairs))
    kept = set(blocks[int(after * len(blocks) + 1e-9) :])  # 0.29 of 100 are 28.999… in binary
    return {name: by for name, by in pairs.items() if name.partition(":")[0] in kept}
