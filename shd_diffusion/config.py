"""The configuration of a run: YAML read into strict, typed models.

Every key that a command or a document names is a field, here or in the room that it belongs to; an unknown key or a
wrong type is a `UserError` of one line that names the file, the key and the fix.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Discriminator, Field, FiniteFloat, Tag, ValidationError, model_validator

from shd_diffusion.data.datasets import DataConfig
from shd_diffusion.data.latents import MANIFEST
from shd_diffusion.data.prepare import EncodeConfig, PrepareConfig
from shd_diffusion.errors import UserError, did_you_mean, one_line
from shd_diffusion.losses import LossesConfig, TeacherLossesConfig
from shd_diffusion.models.factory import ModelConfig, StudentConfig, TeacherConfig
from shd_diffusion.models.forward_process import DiffusionConfig
from shd_diffusion.protocol import flatten
from shd_diffusion.section import MOST_AT_ONCE, MOST_IMAGES, Arguments, Section
from shd_diffusion.shipped import find_config

READS = (
    "data.path",
    "prepare.output",
    "prepare.vae",
    "pipeline",
    "model.pretrained",
    "teacher.path",
    "student.pretrained",
    "evaluate.reference",
    "evaluate.reference.path",
)
"""The keys of a run's config that may name a folder which is read, and which nothing is to be written into."""


def paths_read(tree: Mapping[str, Any]) -> dict[str, str | None]:
    """What a run reads by its config, a tree of plain values: by the keys of `READS`, None where nothing is named.

    Where a key names several, they are numbered: `student.pretrained.0`.
    """
    flat = flatten(tree)
    for key in READS:
        if isinstance(named := flat.get(key), list):
            flat |= {f"{key}.{number}": path for number, path in enumerate(named)}
    return {
        key: None if path is None or isinstance(path, list) else str(path)
        for key, path in (dict.fromkeys(READS) | flat).items()
        if key in READS or key.rpartition(".")[0] in READS
    }


class ValidationConfig(Section):
    """What is measured of the averaged weights every so many steps while training; 0 switches it off.

    `num_images` samples and their Fréchet distance, for images by class; and every term of the loss on `loss_images`
    fixed items of the data at fixed noise and timesteps, without dropped conditions. 0 switches each off.
    """

    every: int = Field(0, ge=0)
    num_images: int = Field(500, ge=0, le=MOST_IMAGES)
    num_inference_steps: int = Field(10, ge=1)
    loss_images: int = Field(0, ge=0, le=MOST_AT_ONCE)

    @model_validator(mode="after")
    def _there_is_something_to_measure(self) -> ValidationConfig:
        if self.num_images == 1:
            raise ValueError("`num_images` of a Fréchet distance are 2 at least; or set it to 0")
        if self.every and not self.num_images and not self.loss_images:
            raise ValueError(
                "there is nothing to measure; set `loss_images` or `num_images`, or `every` to 0"
            )
        return self


class TrainConfig(Section):
    """The optimisation. `batch_size` counts the images of a step, over all processes. After 0 steps the model
    is what it started from, such as the mean of several.

    `micro_batch_size` is how many of them go through the models at once, in one process; None for all of its share.
    Timesteps are drawn `uniform`, or `logit_normal` (Esser et al. 2024, section 3.1). With a `mask_ratio` every batch
    is seen twice, once with at least that share of its tokens dropped (MDTv2). `guidance_range`: a model that is told
    the guidance scale (Flux-dev) is told one of this range, drawn by sample. With `mix` the terms that have a teacher
    see each image mixed with another of its pass, in a pass of their own; all other terms see the images as they are:
    by `mixup` the two are averaged, by `cutmix` a box of one lies in the other, by `cutmix_pick` it is the one of two
    boxes that student and teacher disagree on most.
    """

    max_steps: int = Field(..., ge=0, le=10**9)
    batch_size: int = Field(..., ge=1, le=MOST_AT_ONCE)
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-4, gt=0, le=1e6, allow_inf_nan=False)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    guidance_range: list[FiniteFloat] | None = Field(None, min_length=2, max_length=2)
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    mask_ratio: float = Field(0.0, ge=0, lt=0.8)
    mix: Literal["none", "mixup", "cutmix", "cutmix_pick"] = "none"
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    max_skipped_steps: int = Field(10, ge=1)
    num_processes: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="before")
    @classmethod
    def _mixup_was_a_key(cls, tree: Any) -> Any:
        """Configs of runs before there was `mix` have `mixup`, true or false."""
        if not isinstance(tree, dict) or "mixup" not in tree:
            return tree
        mixup, rest = tree["mixup"], {key: value for key, value in tree.items() if key != "mixup"}
        if mixup not in (True, False) or "mix" in rest:
            raise ValueError("`mixup` is now a value of `mix`; write `mix: mixup`")
        return {**rest, "mix": "mixup" if mixup else "none"}

    @model_validator(mode="after")
    def _mixed_or_masked(self) -> TrainConfig:
        if self.mix != "none" and self.mask_ratio:
            raise ValueError("`mix` and `mask_ratio` each want passes of their own; choose one")
        return self


class SampleConfig(Section):
    """Sampling by a diffusers pipeline. Image j follows from (seed, j), and so does its label, if `random`; or `labels`
    lists classes by name or number, which the images go round, as they go round all of them if `balanced`.

    `pass_size` images go through the model at once: a library's rounding depends on it, so it is part of the
    protocol. `batch_size`, how many images a process takes on at a time, in whole passes, changes no image.
    Text-to-image: the prompts of a file, or the captions of the data, have `images_per_prompt` images each, round and
    round; `pipeline_arguments` are given to the pipeline's call as they are. Without a `guidance_scale` it is the
    call's default there, and 1 by class. Without a `scheduler` it is the pipeline's own; a pipeline that a run makes
    gets DDIM, or Euler for a flow. `clip` keeps the image that is predicted at each step in [-1, 1], by schedulers
    that can; without it that of pixels is clipped, that of latents not. How the model is executed changes images by
    rounding alone, and is part of the protocol too: `dtype` is that of the weights, `attention` one of diffusers'
    attention backends, `compile` has `torch.compile` compile the denoiser, `allow_tf32` lets float32 matrix products
    use TF32.
    """

    num_images: int = Field(1000, ge=1, le=MOST_IMAGES)
    labels: Literal["balanced", "random"] | list[int | str] = "balanced"
    prompts: str | None = None
    images_per_prompt: int = Field(1, ge=1, le=MOST_IMAGES)
    negative_prompt: str | None = None
    pipeline_arguments: Arguments = Field(default_factory=dict)
    num_inference_steps: int = Field(25, ge=1)
    scheduler: str | None = None
    scheduler_arguments: Arguments = Field(default_factory=dict)
    clip: bool | None = None
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    guidance_power: float | None = Field(None, gt=0, allow_inf_nan=False)
    guidance_interval: list[int] | None = Field(None, min_length=2, max_length=2)
    guidance_channels: int | None = Field(None, ge=1)
    pass_size: int = Field(32, ge=1, le=MOST_AT_ONCE)
    batch_size: int = Field(100, ge=1, le=MOST_AT_ONCE)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    compile: bool = False
    allow_tf32: bool = False
    seed: int = Field(0, ge=0, lt=2**63)

    def protocol(self, without: Collection[str]) -> dict[str, Any]:
        """The keys that images depend on, but for some. A usual attention, no compilation and no TF32 are not told:
        they are what images of earlier protocols were made with."""
        usual = {key for key in ("attention", "compile", "allow_tf32") if not getattr(self, key)}
        return self.model_dump(exclude={*without, *usual, "clip"})  # the scheduler tells whether it clips


_Reference = Annotated[
    Annotated[str, Tag("str")] | Annotated[DataConfig, Tag("DataConfig")],
    Discriminator(lambda value: "DataConfig" if isinstance(value, dict | DataConfig) else "str"),
]


class EvaluateConfig(Section):
    """The metrics, the features that they are computed on, and what the images are compared with.

    Without an `extractor` the data set decides; without `metrics` all usual ones are computed that can be. The
    `clip_model`, a folder or hub name, is what images are compared with their prompts by, and the extractor `clip`.
    `classes` says which of the extractor's logits are the data set's classes 0, 1, ...: ten of ImageNet's thousand.
    So many images as `against_teacher` says are compared with the teacher's of the same noise and prompt; 0 is none.
    The `reference` is a folder, a file, or the keys of a data set as in `data`: pictures that were not trained on, such
    as another `split`, and with a `caption_column` their captions. Without it a run's own data are it.
    """

    extractor: str | None = None
    extractor_weights: str | None = None
    clip_model: str | None = None
    classes: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=2)
    reference: _Reference | None = None
    metrics: list[str] | None = None
    resize: Literal["none", "box", "bilinear", "bicubic", "lanczos"] = "none"
    batch_size: int = Field(default=100, ge=1, le=MOST_AT_ONCE)
    against_teacher: int = Field(0, ge=0)


class EvaluationConfig(Section):
    """`evaluate` of what is no run: images, or a pipeline that is sampled first."""

    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class RunConfig(Section):
    """What the training of a teacher and a distillation share. With a section `prepare` they train on its cache."""

    seed: int = Field(0, ge=0, lt=2**63)
    output: str | None = None
    data: DataConfig = DataConfig()
    prepare: EncodeConfig | None = None
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _cache_has_a_place(self) -> RunConfig:
        if self.prepare is not None and self.prepare.output is None:
            raise ValueError("`prepare` needs the key `output` here: the folder of the cache; add it")
        return self

    @property
    def reads(self) -> dict[str, str | None]:
        """What is read, by the keys of `READS`."""
        return paths_read(self.model_dump(mode="json", by_alias=True))

    @property
    def within(self) -> str | None:
        """The pipeline that the model is to stand in; None where the run makes one."""
        return None

    @property
    def trained_on(self) -> DataConfig:
        """What the models see: the data, or the cache that `prepare` has made of them."""
        if self.prepare is None:
            return self.data
        kept = self.data.model_dump(include={"horizontal_flip", "verify", "num_workers"})
        return DataConfig(name="latents", path=self.prepare.output, **kept)


class TrainTeacherConfig(RunConfig):
    """`train-teacher`: a model on the denoising loss alone; in a text-to-image `pipeline`, if one is given."""

    pipeline: str | None = None
    model: ModelConfig
    losses: TeacherLossesConfig = TeacherLossesConfig()

    @property
    def within(self) -> str | None:
        return self.pipeline


class DistillConfig(RunConfig):
    """`distill`: a student from a teacher. `diffusion` is the teacher's; a key that says otherwise is an error."""

    teacher: TeacherConfig
    student: StudentConfig
    losses: LossesConfig = LossesConfig()

    @property
    def within(self) -> str | None:
        return self.teacher.path


# --- reading -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2: PyYAML reads `2e-3` as a string, `no` as false and `2026-01-02` as a date, which nobody means."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- the name that PyYAML looks for
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read back as text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
for _of in (_Loader, _Dumper):
    _of.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )


def _mapping_of_single_keys(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    """PyYAML takes a key that is given twice, and forgets the first: a second `train:` would drop all of the first."""
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise yaml.constructor.ConstructorError(None, None, f"key `{twice}` is given twice", node.start_mark)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_of_single_keys)

MOST_VALUES = 100_000

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


def parse_yaml(text: str) -> Any:
    """A YAML document as plain Python objects.

    Raises:
        ValueError: the text is not YAML, or by its aliases is far more than it seems.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)
        size = _size(tree, {})
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
    if size > MOST_VALUES:
        raise ValueError(f"its aliases make more than {MOST_VALUES} values of it")
    return tree


def _size(tree: Any, known: dict[int, float]) -> float:
    """How many values there are, those behind aliases as often as they are named; infinity where one holds itself."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        known[id(tree)] = math.inf
        inside = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_size(each, known) for each in inside)
    return known[id(tree)]


def read_config(path: Path, kind: type[AnyConfig], overrides: Iterable[str] = ()) -> AnyConfig:
    """Read a config file and apply `dotted.key=value` overrides, each value in YAML notation.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    tree = _read_tree(path)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, kind, source=str(path))


def read_run_config(path: Path) -> TrainTeacherConfig | DistillConfig:
    """Read the config of a training, which is a distillation if it names a student; errors as for `read_config`."""
    tree = _read_tree(path)
    return parse_config(tree, _kind_of(tree) or TrainTeacherConfig, source=str(path))


def training_of(path: Path) -> Literal["distill", "train-teacher"] | None:
    """The command that trains by a config; None for one of `prepare` alone. Errors as for `read_config`."""
    kind = _kind_of(_read_tree(path))
    if kind is None:
        return None
    return "distill" if kind is DistillConfig else "train-teacher"


def _kind_of(tree: Mapping[str, Any]) -> type[TrainTeacherConfig] | type[DistillConfig] | None:
    """What a config of a training is; None where it names no model, so that it is none."""
    return DistillConfig if "student" in tree else TrainTeacherConfig if "model" in tree else None


def read_prepare_config(path: Path, overrides: Iterable[str] = ()) -> PrepareConfig:
    """The config of `prepare`: a file of its own, or a section of a training's; errors as for `read_config`."""
    kind: Any = _kind_of(_read_tree(path))
    if kind is None:
        return read_config(path, PrepareConfig, overrides)
    config: RunConfig = read_config(path, kind, overrides)
    if config.prepare is None:
        raise UserError(
            f"{path}: section `prepare` is missing; add it, with `output`, the folder of the cache"
        )
    return PrepareConfig(
        output=config.prepare.output, data=config.data, prepare=config.prepare, pipeline=config.within
    )


def read_data_config(path: Path, overrides: Iterable[str] = ()) -> DataConfig:
    """What the models of a training's config will see: its data, or its cache where that is there; or the data of a
    config of `prepare`. Errors as for `read_config`."""
    kind: Any = _kind_of(_read_tree(path))
    if kind is None:
        return read_config(path, PrepareConfig, overrides).data
    config: RunConfig = read_config(path, kind, overrides)
    cached = config.prepare is not None and Path(config.prepare.output or "", MANIFEST).is_file()
    return config.trained_on if cached else config.data


def override_config(config: AnyConfig, overrides: Iterable[str], source: str) -> AnyConfig:
    """The same config with `dotted.key=value` overrides; errors as for `read_config`."""
    tree = config.model_dump(mode="json", by_alias=True)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, type(config), source)


def check_read(overrides: Iterable[str], sections: Sequence[str], what: str) -> None:
    """See that overrides change something: those of a section that is not read would be passed over in silence.

    Args:
        sections: that are read.
        what: reads them, with what to do instead.

    Raises:
        UserError: one is of another section.
    """
    for override in overrides:
        if override.partition("=")[0].split(".")[0].strip() not in sections:
            known = ", ".join(f"`{section}`" for section in sections)
            raise UserError(f"--set {override}: has no effect, only {known} has: {what}")


def parse_config(tree: dict[str, Any], kind: type[AnyConfig], source: str) -> AnyConfig:
    """Check a tree of plain values against a config model; `source` is the name used in messages.

    Paths that begin with `~/` are those of the home folder, as in a shell.
    """
    try:
        return kind.model_validate(_at_home(tree))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, kind)}") from None


def _at_home(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _at_home(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_at_home(value) for value in tree]
    return str(Path(tree).expanduser()) if isinstance(tree, str) and tree.startswith("~/") else tree


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; reading it back gives the same config."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's tree of plain values, on top of that of the file that its `base` names, beside it."""
    path = find_config(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a config file"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not a YAML file ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, see configs/ for examples")
    base = tree.pop("base", None)
    if base is None:
        return tree
    place = path.resolve()  # a file may go by many names: `../configs/a.yaml` from within `configs`
    if not isinstance(base, str) or place in above:
        raise UserError(f"{path}: key `base` is {base!r}: give another config file, beside this one")
    return _merged(_read_tree(path.parent / base, (*above, place)), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key, all else replaced."""
    both = {key: (below.get(key), value) for key, value in above.items()}
    return below | {
        key: _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
        for key, (old, new) in both.items()
    }


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(f"--set {override}: write it as dotted.key=value, e.g. --set train.max_steps=100")
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: `{parent}` is a value, not a section")
        node = child
    try:
        node[last] = parse_yaml(text)
    except ValueError:
        raise UserError(f"--set {override}: the value is not YAML; quote it") from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first finding in one line: the key, what is wrong, what was meant."""
    found = error.errors(include_url=False)
    # a misspelt key is missing as well: what was meant is said first
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    location = first["loc"]
    key = ".".join(str(part) for part in location if not _is_union_tag(part))
    if first["type"] == "extra_forbidden":
        known = _keys_beside(kind, location)
        return f"unknown key `{key}`; {did_you_mean(str(location[-1]), known)}"
    if first["type"] == "missing":
        return f"key `{key}` is missing; add it"
    if first["type"] == "value_error":
        return f"key `{key}`: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"key `{key}` is {reprlib.repr(first['input'])}: {message}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("list", "str", "int", "float", "DataConfig"))


def _keys_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section in which the unknown key stands."""
    if "DataConfig" in location:  # the tag of a union
        kind, location = DataConfig, location[location.index("DataConfig") + 1 :]
    for part in location[:-1]:
        field = next((f for n, f in kind.model_fields.items() if part in (n, f.alias)), None)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return [field.alias or name for name, field in kind.model_fields.items()]
