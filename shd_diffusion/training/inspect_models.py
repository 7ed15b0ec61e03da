"""What SHD would work with: a model's attention blocks, and which block of a student learns from which, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from diffusers import ModelMixin
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shd_diffusion.attention import AttentionBlock, AttentionRecord, attention_blocks
from shd_diffusion.losses.layer_map import LayerMap, map_blocks
from shd_diffusion.losses.token_grid import common_grid
from shd_diffusion.models.denoiser import count_parameters, null_condition, sample_shape
from shd_diffusion.models.trace import trace
from shd_diffusion.squeezing.plan import Plan, members, plan_merges


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One row of the listing: an attention block, or one of the records that a joint block leaves.

    Attributes:
        block: what is known without a forward pass; its name is the record's.
        record: of a forward pass, shapes only; None where no pass tells: an ordinary one skips the block, or the model
            wants other conditions than are at hand.
    """

    block: AttentionBlock
    record: AttentionRecord | None = None

    @property
    def tokens(self) -> str:
        """Number of query tokens, and of key tokens where it is another."""
        if self.record is None:
            return "?"
        queries, keys = self.record.query.shape[2], self.record.key.shape[2]
        return str(queries) if queries == keys else f"{queries} × {keys}"


def inspect_model(model: ModelMixin) -> list[BlockRow]:
    """The attention blocks of a model in order of depth, as they see a sample of the size in its config."""
    shape = sample_shape(model)
    records: Mapping[str, AttentionRecord] = {}
    if shape is not None:
        with suppress(ValueError):  # it wants more than a label
            records = trace(model, shape, null_condition(model)).records
    return rows_of(model, records)


def rows_of(model: ModelMixin, records: Mapping[str, AttentionRecord]) -> list[BlockRow]:
    """The attention blocks of a model in order of depth, with the records of a pass."""
    rows = []
    for name, block in attention_blocks(model).items():
        own = [record for record in records.values() if record.name.partition(":")[0] == name]
        rows += [BlockRow(replace(block, name=r.name), r) for r in own] or [BlockRow(block)]
    return rows


def pair_rows(
    teacher: Sequence[BlockRow], student: Sequence[BlockRow], layer_map: LayerMap = "uniform"
) -> dict[str, str]:
    """Which teacher block each student block would learn from.

    Raises:
        ValueError: the blocks cannot be mapped.
    """
    of_teacher, of_student = (
        {row.block.name: row.block.kind for row in _mapped(rows)} for rows in (teacher, student)
    )
    return map_blocks(of_teacher, of_student, layer_map)


def _mapped(rows: Sequence[BlockRow]) -> list[BlockRow]:
    """The blocks that leave records, as far as a pass has told."""
    told = any(row.record is not None for row in rows)
    return [row for row in rows if row.block.capturable and (row.record is not None or not told)]


def merges_of(teacher: BlockRow, student: BlockRow) -> Plan:
    """How the teacher's heads would merge, by adjacent pairing.

    Raises:
        ValueError: the two blocks cannot be compared.
    """
    plan = plan_merges(teacher.block.heads, student.block.heads)
    if teacher.record is not None and student.record is not None:
        common_grid(teacher.record, student.record)
    return plan


# --- tables -------------------------------------------------------------------------------------------------


def render(model: ModelMixin, rows: Sequence[BlockRow]) -> Table:
    """A model's blocks, for a terminal."""
    table = _table(f"{type(model).__name__}, {count_parameters(model):,} parameters", "attention block")
    table.add_column("kind")
    for column in ("heads", "head width", "tokens"):
        table.add_column(column, justify="right")
    table.add_column("captured")
    for row in rows:
        block = row.block
        shared = "" if block.key_value_heads == block.heads else f" ({block.key_value_heads} key heads)"
        heads = f"{block.heads}{shared}"
        reason = block.reason or "yes"
        table.add_row(block.name, block.kind, heads, str(block.head_dim), row.tokens, reason)
    return table


def render_pair(teacher: Sequence[BlockRow], student: Sequence[BlockRow], pairs: Mapping[str, str]) -> Table:
    """Which student block learns from which, and how the teacher's heads merge on the way."""
    table = _table("student from teacher", "student block", "learns from")
    for column in ("tokens", "heads", "merged heads"):
        table.add_column(column)
    teacher_rows, student_rows = ({row.block.name: row for row in rows} for rows in (teacher, student))
    for name, by in pairs.items():
        own, other = student_rows[name], teacher_rows[by]
        try:
            plan, problem = merges_of(other, own), None
        except ValueError as error:
            plan, problem = (), str(error)
        rounds = "→".join(str(n) for n in (other.block.heads, *map(len, plan)))
        behind = " ".join("+".join(map(str, group)) for group in members(plan, other.block.heads))
        tokens = other.tokens if other.tokens == own.tokens else f"{other.tokens} → {own.tokens}"
        table.add_row(name, by, tokens, rounds, problem or behind)
    return table


def _table(title: str, *names: str) -> Table:
    """A table whose first columns hold module paths, which a narrow terminal folds and never cuts."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    return table
