"""What every section of a config is: a strict, typed model. Each room defines its own; config.py puts them together."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a config: unknown keys are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)
