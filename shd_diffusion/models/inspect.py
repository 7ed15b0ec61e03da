"""What SHD would work with: a model's attention blocks, and which block of a student learns from which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import ModelMixin
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from shd_diffusion.attention import AttentionBlock, AttentionCapture, AttentionRecord, attention_blocks
from shd_diffusion.losses import map_blocks
from shd_diffusion.losses.blocks import LayerMap
from shd_diffusion.losses.grids import common_grid
from shd_diffusion.models.adapter import count_parameters, null_label, predict, sample_shape
from shd_diffusion.squeezing.plan import Plan, members, plan_merges


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One row of the listing: an attention block, or one of the records that a joint block leaves.

    Attributes:
        block: what is known without a forward pass; its name is the record's.
        record: of a forward pass at the configured size, shapes only (on the meta device); None where no
            pass tells: an ordinary one skips the block, or the model wants more than timesteps and labels.
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


@dataclass(frozen=True, slots=True)
class PairRow:
    """A student block, the teacher block it learns from, and how the teacher's heads merge.

    Attributes:
        problem: why the two cannot be compared; None if they can.
    """

    student: BlockRow
    teacher: BlockRow
    plan: Plan = ()
    problem: str | None = None


def inspect_model(model: ModelMixin) -> list[BlockRow]:
    """The attention blocks of a model in order of depth."""
    left = _run_without_weights(model)
    rows = []
    for name, block in attention_blocks(model).items():
        own = [record for record in left.values() if record.name.partition(":")[0] == name]
        rows += [BlockRow(replace(block, name=r.name), r) for r in own] or [BlockRow(block)]
    return rows


def inspect_pair(
    teacher: Sequence[BlockRow], student: Sequence[BlockRow], layer_map: LayerMap = "uniform"
) -> list[PairRow]:
    """Which teacher block each student block would learn from, and the merges on the way (adjacent pairing).

    Raises:
        ValueError: the blocks cannot be mapped.
    """
    theirs, ours = ({row.block.name: row for row in _mapped(rows)} for rows in (teacher, student))
    taught, learning = ({name: row.block.kind for name, row in rows.items()} for rows in (theirs, ours))
    return [_pair(ours[name], theirs[by]) for name, by in map_blocks(taught, learning, layer_map).items()]


def render(
    model: ModelMixin, student: ModelMixin | None = None, layer_map: LayerMap = "uniform"
) -> RenderableType:
    """Tables for a terminal: the model's blocks and, with a student, the student's and the pairs of both.

    Raises:
        ValueError: the blocks of the two cannot be mapped.
    """
    rows = inspect_model(model)
    if student is None:
        return _block_table(model, rows)
    learning = inspect_model(student)
    pairs = _pair_table(inspect_pair(rows, learning, layer_map))
    return Group(_block_table(model, rows), _block_table(student, learning), pairs)


def _run_without_weights(model: ModelMixin) -> dict[str, AttentionRecord]:
    """Records of one forward pass of the model's twin on the meta device, which computes shapes only."""
    try:
        shape, label = sample_shape(model), null_label(model)
    except ValueError:  # not class-conditional
        return {}
    with torch.device("meta"), torch.no_grad():
        twin = type(model).from_config(model.config).eval()
        if not any(block.capturable for block in attention_blocks(twin).values()):
            return {}
        with AttentionCapture(twin) as capture:
            predict(twin, torch.empty(1, *shape), torch.zeros(1, dtype=torch.long), torch.tensor([label]))
            return capture.records


def _mapped(rows: Sequence[BlockRow]) -> list[BlockRow]:
    """The blocks that leave records, as far as a pass has told."""
    told = any(row.record is not None for row in rows)
    return [row for row in rows if row.block.capturable and (row.record is not None or not told)]


def _pair(student: BlockRow, teacher: BlockRow) -> PairRow:
    try:
        plan = plan_merges(teacher.block.heads, student.block.heads)
        if teacher.record is not None and student.record is not None:
            common_grid(teacher.record, student.record)
    except ValueError as error:
        return PairRow(student, teacher, problem=str(error))
    return PairRow(student, teacher, plan)


# --- tables -------------------------------------------------------------------------------------------------


def _block_table(model: ModelMixin, rows: Sequence[BlockRow]) -> Table:
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


def _pair_table(pairs: Sequence[PairRow]) -> Table:
    table = _table("student from teacher", "student block", "learns from")
    for column in ("tokens", "heads", "merged heads"):
        table.add_column(column)
    for pair in pairs:
        ours, theirs = pair.student, pair.teacher
        rounds = "→".join(str(n) for n in (theirs.block.heads, *map(len, pair.plan)))
        behind = " ".join("+".join(map(str, group)) for group in members(pair.plan, theirs.block.heads))
        tokens = theirs.tokens if theirs.tokens == ours.tokens else f"{theirs.tokens} → {ours.tokens}"
        table.add_row(ours.block.name, theirs.block.name, tokens, rounds, pair.problem or behind)
    return table


def _table(title: str, *names: str) -> Table:
    """A table whose first columns hold module paths, which a narrow terminal folds and never cuts."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    return table
