"""Build a model from a config, load one that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from pydantic import Field, model_validator

from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json
from shd_diffusion.models.dit import OriginalDiTTransformer2DModel
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.section import Section



class ModelConfig(Section):
    """A model by its diffusers class (or one of the project's) and the arguments of its constructor."""

    class_name: str = Field("DiTTransformer2DModel", alias="class")
    arguments: dict[str, Any] = {}
    pretrained: str | None = None


class StudentConfig(ModelConfig):
    """The model that is distilled into; `init: teacher` starts it from the teacher's weights where shapes allow."""

    init: Literal["random", "teacher"] = "random"

    @model_validator(mode="after")
    def _starts_from_one_model(self) -> StudentConfig:
        if self.init == "teacher" and self.pretrained is not None:
            raise ValueError(
                "`pretrained` and `init: teacher` both give the weights to start from; choose one"
            )
        return self


class TeacherConfig(Section):
    """The trained model to distil from: a run folder, a pipeline or model folder, or a hub name.

    It is never trained, so `dtype` may be half as wide as the student's.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["accelerator", "cpu"] = "accelerator"


OWN_CLASSES = {kind.__name__: kind for kind in (MDTv2Transformer2DModel, OriginalDiTTransformer2DModel)}


def model_class(name: str) -> type[ModelMixin]:
    """A denoiser class by its name, one of the project's or of diffusers.

    Raises:
        ValueError: no class of that name is a diffusers model.
    """
    found = OWN_CLASSES.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(f"`{name}` is no model class of diffusers {diffusers.__version__}")
    return found


def build_model(config: ModelConfig) -> ModelMixin:
    """A new model with random weights, or with those of `pretrained`.

    Raises:
        ValueError: the class is unknown or its constructor refuses the arguments.
        UserError: `pretrained` cannot be loaded.
    """
    if config.pretrained is not None:
        return load_model(config.pretrained)
    kind = model_class(config.class_name)
    unknown = sorted(set(config.arguments) - set(kind._get_init_keys(kind)))
    if unknown:
        raise ValueError(f"`{config.class_name}` takes no argument `{unknown[0]}`")
    try:
        return _without_label_dropout(kind(**config.arguments))
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`{config.class_name}` refuses its arguments: {error}") from error


def load_model(path: str) -> ModelMixin:
    """Load a denoiser from a run folder, a pipeline folder, a model folder, or by its hub name.

    Raises:
        UserError: there is no such model, its class is unknown, or its weights are missing.
    """
    folder = find_model_folder(Path(path))
    if folder is None and Path(path).exists():
        raise UserError(
            f"{path}: no model in this folder; expected a run, a diffusers pipeline or a diffusers model"
        )
    try:
        if folder is not None:
            kind = model_class(read_json(folder / "config.json").get("_class_name", ""))
            return _without_label_dropout(kind.from_pretrained(folder, use_safetensors=True))
        return _without_label_dropout(_load_from_hub(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be loaded as a model ({reason}); give a run or model folder"
        ) from error


def find_model_folder(path: Path) -> Path | None:
    """The folder of the denoiser inside a run, a pipeline or a model folder; None if there is none."""
    candidates = (
        path / "pipeline" / "denoiser",
        path / "denoiser",
        path / "transformer",
        path / "unet",
        path,
    )
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _load_from_hub(name: str) -> ModelMixin:
    index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(name)
    part = next(part for part in ("transformer", "unet", "denoiser") if part in index)
    return model_class(index[part][1]).from_pretrained(name, subfolder=part)


def _without_label_dropout(model: ModelMixin) -> ModelMixin:
    """Labels are dropped once, outside the model, for teacher and student alike.

    diffusers' DiT would drop them a second time in train mode, in each block's embedding independently.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model
