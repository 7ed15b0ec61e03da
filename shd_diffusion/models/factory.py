"""Build a model from a config, load one that was saved."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Container
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_json
from shd_diffusion.models import squeezed
from shd_diffusion.models.denoiser import prepare
from shd_diffusion.models.dit import OriginalDiTTransformer2DModel
from shd_diffusion.models.hub import try_hub
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.own_width import width_to_set
from shd_diffusion.models.soup import mean_model
from shd_diffusion.section import Arguments, Section


class ModelConfig(Section):
    """A model by its diffusers class (or one of the project's) and the arguments of its constructor; or a `pretrained`
    one, by a run, a pipeline or model folder, or a hub name; of several the mean of their weights, which are to have
    been trained from the same ones.

    Without a class it is like the teacher, or like the one in the pipeline, but for the `arguments`.
    """

    class_name: str | None = Field(None, alias="class")
    arguments: Arguments = Field(default_factory=dict)
    pretrained: str | Annotated[list[str], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _is_given_once(self) -> ModelConfig:
        if self.pretrained is not None and (self.arguments or self.class_name is not None):
            raise ValueError(
                "`pretrained` gives class and arguments too; remove `class` and `arguments`, or it"
            )
        return self


class StudentConfig(ModelConfig):
    """The model that is distilled into. `init: teacher` starts it from the teacher's weights where shapes allow,
    `init: squeeze` from what least squares makes of them in its own shape, on `init_images` of the run's data: all of
    them go through both models side by side, so fewer take less memory. With `quantise: int8` its linear layers
    round weights and features to 8 bits while it trains, and it is saved with such weights."""

    init: Literal["random", "teacher", "squeeze"] = "random"
    init_images: int = Field(512, ge=1)
    quantise: Literal["int8"] | None = None

    @model_validator(mode="after")
    def _starts_from_one_model(self) -> StudentConfig:
        if self.init != "random" and self.pretrained is not None:
            raise ValueError(
                f"`pretrained` and `init: {self.init}` both give the weights to start from; choose one"
            )
        if self.init != "squeeze" and "init_images" in self.changed():
            raise ValueError("`init_images` is what `init: squeeze` is fitted on; remove it, or set that")
        return self


class TeacherConfig(Section):
    """The trained model to distil from: a run folder, a pipeline or model folder, or a hub name.

    It is not trained, so `dtype` may be half as wide as the student's; unless it has a `learning_rate`: then it goes on
    with its own regression on the batches that it teaches, from weights that the checkpoints keep and the run leaves
    behind. `config` is what `--dry-run` reads in place of `path`, where that cannot be had: a folder of a pipeline's
    config files alone, or a config of `train-teacher`.
    """

    path: str
    config: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["accelerator", "cpu"] = "accelerator"
    learning_rate: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors call precisions below float32."""

DEFAULT_CLASS = "DiTTransformer2DModel"

DENOISERS = ("denoiser", "transformer", "unet")
"""What pipelines call the part that is distilled."""

OWN_CLASSES = {kind.__name__: kind for kind in (MDTv2Transformer2DModel, OriginalDiTTransformer2DModel)}


def model_class(name: str) -> type[ModelMixin]:
    """A denoiser class by its name, one of the project's, of diffusers, or `Squeezed` and such a name.

    Raises:
        ValueError: no class of that name is a diffusers model.
    """
    found = OWN_CLASSES.get(name) or getattr(diffusers, name, None) or getattr(squeezed, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(f"`{name}` is no model class of diffusers {diffusers.__version__}")
    return found


def build_model(config: ModelConfig) -> ModelMixin:
    """A new model with random weights, or with those of `pretrained`.

    Raises:
        ValueError: the class is unknown or its constructor refuses the arguments.
        UserError: `pretrained` cannot be loaded.
    """
    if isinstance(config.pretrained, list):
        return mean_model(config.pretrained, load_model)
    if config.pretrained is not None:
        return load_model(config.pretrained)
    class_name = config.class_name or DEFAULT_CLASS
    kind = model_class(class_name)
    unknown = sorted(set(config.arguments) - set(kind._get_init_keys(kind)))
    if unknown:
        raise ValueError(f"`{class_name}` takes no argument `{unknown[0]}`")
    try:
        _check_memory(kind, config.arguments)
        return ready(kind(**config.arguments))
    except Exception as error:  # constructors check little, and fail where the argument is used
        width = width_to_set(class_name, config.arguments)
        raise ValueError(f"`{class_name}` refuses its arguments: {one_line(error)}{width}") from error


def _check_memory(kind: type[ModelMixin], arguments: dict[str, Any]) -> None:
    """See that a model's weights fit this machine before they are allocated, which may end the process.

    Raises:
        ValueError: they do not.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        needed = sum(p.nbytes for p in kind(**arguments).parameters())
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present and torch.get_default_device().type != "meta":
        raise ValueError(f"its weights are {needed / 1e9:,.0f} GB, more than this machine has")


def fill_in(config: ModelConfig, path: str | None) -> ModelConfig:
    """The same with the class and the arguments that it leaves open: those of the model at a path as for `load_model`.

    Raises:
        UserError: the model there has no readable config.
    """
    if path is None or config.class_name is not None or config.pretrained is not None:
        return config
    folder = find_model_folder(Path(path))
    try:
        if folder is not None:
            settings = read_json(folder / "config.json")
        elif try_hub(path):
            kind, part = _denoiser_on_hub(path)
            settings = kind.load_config(path, subfolder=part)
        else:
            raise ValueError("no model here")
        class_name = settings["_class_name"]
        known = model_class(class_name)._get_init_keys(model_class(class_name))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of any kind
        raise UserError(f"{path}: has no config of a model ({one_line(error)})") from error
    present = {key: value for key, value in settings.items() if key in known}
    return config.model_copy(update={"class_name": class_name, "arguments": {**present, **config.arguments}})


def empty_model(config: ModelConfig, path: str | None = None) -> ModelMixin:
    """A model without weights, on the meta device, also of one that is `pretrained`: only configs are read.

    Args:
        config: what it is.
        path: of the model that it is like where the config leaves it open, see `fill_in`.

    Raises:
        ValueError: as `build_model`.
        UserError: the model there has no readable config.
    """
    if (pretrained := config.pretrained) is not None:
        config, path = ModelConfig(), first_of(pretrained)
    with torch.device("meta"):
        return build_model(fill_in(config, path))


def first_of(pretrained: str | list[str]) -> str:
    """The one model, or of several that are alike the first."""
    return pretrained if isinstance(pretrained, str) else pretrained[0]


def cast(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """A model in a precision, in place, but for the parts that its class keeps in float32, as `load_model` does it."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
    return model


def load_model(path: str, dtype: torch.dtype | None = None) -> ModelMixin:
    """Load a denoiser from a run folder, a pipeline folder, a model folder, or by its hub name.

    Args:
        path: the folder or name.
        dtype: of its weights; None for float32. Parts that the class keeps in float32 stay so.

    Raises:
        UserError: there is no such model, its class is unknown, or its weights are missing or damaged.
    """
    folder = find_model_folder(Path(path))
    if Path(path).is_file():
        raise UserError(
            f"{path}: is a file; load it once by `from_single_file` of its pipeline's class, and give the folder that "
            "`save_pretrained` makes"
        )
    if folder is None and not try_hub(path):
        raise UserError(
            f"{path}: no model here; give a run, a diffusers pipeline or model folder, or a hub name"
        )
    try:
        if folder is not None:
            kind = model_class(read_json(folder / "config.json").get("_class_name", ""))
            return _load(kind, str(folder), None, dtype)
        kind, part = _denoiser_on_hub(path)
        return _load(kind, path, part, dtype)
    except UserError:
        raise
    # diffusers, transformers and safetensors raise errors of any kind on damaged files
    except Exception as error:
        fix = "give a run or model folder" if folder is None else _fix_of_layout(folder)
        raise UserError(f"{path}: cannot be loaded as a model ({one_line(error)}); {fix}") from error


def _fix_of_layout(folder: Path) -> str:
    """What to do about a folder whose model cannot be loaded, by the files that it holds."""
    weights = [file.name for file in folder.glob("*.safetensors")]
    variants = {name.split(".")[1].partition("-")[0] for name in weights if name.count(".") == 2}
    if variants and all(name.count(".") == 2 for name in weights):
        variant = sorted(variants)[0]
        return f"load its pipeline once with `variant={variant!r}`, and give the folder that `save_pretrained` makes"
    if not weights and any(folder.glob("*.bin")):
        return "load its pipeline once, and give the folder that `save_pretrained` makes, with safetensors"
    return "give a run or model folder"


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision of most weights in a model's folder.

    Raises:
        UserError: it holds no safetensors.
    """
    counts: Counter[torch.dtype] = Counter()
    files = [*folder.glob("*.safetensors")]
    for file in [
        file for file in files if file.name.count(".") == 1
    ] or files:  # not *.fp16.safetensors beside them
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                counts[DTYPES.get(part.get_dtype(), torch.float32)] += math.prod(part.get_shape())
    if not counts:
        raise UserError(f"{folder}: no weights in it, which are .safetensors; save the model anew")
    return counts.most_common(1)[0][0]


def denoiser_part(parts: Container[str]) -> str | None:
    """What a pipeline with these parts calls its denoiser; None where it has none."""
    return next((part for part in DENOISERS if part in parts), None)


def _denoiser_on_hub(name: str) -> tuple[type[ModelMixin], str]:
    """The class of a hub pipeline's denoiser, and what the pipeline calls it.

    Raises:
        ValueError: it has none, or of a class that is unknown.
    """
    index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(name)
    part = denoiser_part(index)
    if part is None:
        raise ValueError(f"a pipeline without {' or '.join(DENOISERS)}")
    return model_class(index[part][1]), part


def _load(kind: type[ModelMixin], path: str, subfolder: str | None, dtype: torch.dtype | None) -> ModelMixin:
    """A model with all its weights.

    Raises:
        ValueError: weights are missing, or are not finite.
    """
    model, report = kind.from_pretrained(
        path, subfolder=subfolder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise ValueError(f"weights are missing: {sorted(missing)[0]}")
    check_weights(model)
    return ready(model)


def check_weights(model: nn.Module) -> None:
    """See that a model's files held all weights, and numbers in them.

    Raises:
        ValueError: they do not; the first such weight is named.
    """
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if weight.is_meta:  # what a file lacks is left without numbers
            raise ValueError(f"weights are missing: {name}")
        if not weight.isfinite().all():
            raise ValueError(f"weights are not finite: {name}")


def find_model_folder(path: Path) -> Path | None:
    """The folder of the denoiser inside a run, a pipeline or a model folder; None if there is none."""
    candidates = (
        *(path / "pipeline" / part for part in DENOISERS),
        *(path / part for part in DENOISERS),
        path,
    )
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def ready(model: ModelMixin) -> ModelMixin:
    """The model as it is trained, or teaches.

    Labels are dropped once, outside the model, for teacher and student alike: diffusers' DiT would drop them a second
    time in train mode, in each block's embedding independently.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return prepare(model)
