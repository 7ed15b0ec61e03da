"""`summary.json`: what a finished run says of itself, written by its stage and read by all later ones."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Summary(BaseModel):
    """What a run has come to.

    Attributes:
        class_name: of its model; `class` in the file.
        parameters: of its model alone.
        heads: the most that any attention block has.
        head_dim: the widest.
        blocks: its attention blocks.
        images: that it was trained on, with repetitions.
        class_names: of the classes that its model is told; None where it is told none, or they have no names.
        teacher: its folder or hub name; None where it was trained without.
        teacher_heads: as `heads`.
        extra_parameters: trained beside the model and left behind, such as projectors.
        losses: the weights of the terms that it was trained on; None of an earlier version, or where nothing was
            trained.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True)

    name: str
    stage: Literal["train-teacher", "distill", "compress"]
    class_name: str = Field(alias="class")
    parameters: int = Field(ge=0)
    heads: int = Field(ge=0)
    head_dim: int = Field(0, ge=0)
    blocks: int = Field(ge=0)
    steps: int = Field(ge=0)
    images: int = Field(ge=0)
    class_names: list[str] | None = None
    teacher: str | None = None
    teacher_heads: int | None = Field(None, ge=0)
    extra_parameters: int = Field(0, ge=0)
    losses: dict[str, float] | None = None
