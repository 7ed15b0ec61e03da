"""docs/keys.md: every key of a config with its type and default, from the models that read it.

python docs/make_keys.py > docs/keys.md
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from shd_diffusion.config import DistillConfig, TrainTeacherConfig
from shd_diffusion.data import DataConfig
from shd_diffusion.data.prepare import PrepareConfig
from shd_diffusion.study.config import StudyConfig
from shd_diffusion.training.text_pipeline import TextPipelineConfig

FILES: dict[str, type[BaseModel]] = {
    "distill": DistillConfig,
    "train-teacher": TrainTeacherConfig,
    "prepare": PrepareConfig,
    "make-pipeline": TextPipelineConfig,
    "study": StudyConfig,
}
HEAD = """# Keys of the configs

Written by `python docs/make_keys.py`; a test sees that it is current. Any key can be set on the command line, such as
`--set train.max_steps=100`. What the choices of a loss come to stands in
[losses.md](losses.md) and [options.md](options.md).
"""


def page() -> str:
    """The whole page: each kind of file with its sections; a section that was told already is referred to."""
    told: set[type[BaseModel]] = set()
    parts = [HEAD]
    for command, model in FILES.items():
        parts.append(f"## `{command}`\n")
        parts += [text for path, section in sections(model) for text in _section(path, section, told)]
    return "\n".join(parts)


def sections(model: type[BaseModel], path: str = "") -> list[tuple[str, type[BaseModel]]]:
    """A model and the models of its keys, in their order, by dotted path."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        if (inner := _model_in(field.annotation)) is not None:
            found += sections(inner, f"{path}.{field.alias or name}".lstrip("."))
    return found


def _section(path: str, model: type[BaseModel], told: set[type[BaseModel]]) -> list[str]:
    """Its heading, what its docstring says, and a table of its keys."""
    if model in told:
        return []
    told.add(model)
    words, meanings = _docstring(model)
    told_keys = any(name in meanings for name in model.model_fields)
    rows = [
        f"| `{field.alias or name}` | {_type(field.annotation)} | {_default(field)} |"
        + f" {meanings.get(name, '')} |" * told_keys
        for name, field in model.model_fields.items()
        if _model_in(field.annotation) is None
    ]
    head = ["| key | type | default |" + " |" * told_keys, "|---|---|---|" + "---|" * told_keys]
    table = [*head, *rows, ""] if rows else []
    if not words and not rows:
        return []
    return [*([f"### `{path}`\n"] if path else []), words + "\n", *table]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a key's value is, if it is one or none at all."""
    for each in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(each) and issubclass(each, BaseModel):
            return each
    return None


def _docstring(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """The words of a class, and of its `Attributes` what each says."""
    words, _, _ = inspect.cleandoc(model.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        _, _, lines = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
        for entry in re.findall(r"^ {4}(\w+): ((?:.|\n {8})+)", lines, re.MULTILINE):
            found[entry[0]] = " ".join(entry[1].split()).replace("|", r"\|")
    return words, found


def _type(annotation: Any) -> str:
    """A type as a person writes it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in inner if each is not type(None))
    if annotation is DataConfig:
        return "keys as in `data`"
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping to {_type(inner[1])}"
    names = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: Any) -> str:
    """A default as YAML has it; nothing where the key must be given."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**must be given**"
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(page(), end="")
