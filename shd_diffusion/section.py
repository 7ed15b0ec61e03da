"""What every section of a config is: a strict, typed model. Each room defines its own; config.py puts them together."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a config: unknown keys are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    def changed(self) -> set[str]:
        """The keys that have another value than without them."""
        return {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        }


def _finite(value: Any) -> Any:
    """Values of other libraries' arguments, of which none may be infinite or no number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(each)
    return value


Arguments = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Arguments for a class or a call of another library, which alone knows what they may be."""

MOST_AT_ONCE, MOST_IMAGES = 2**20, 10**8
"""Bounds of what is held in memory at once, and of what is counted image by image: beyond them is a slip of the pen."""
