"""The configuration of a run: YAML read into strict, typed models.

Every key that a command or a document names is a field here; an unknown key or a wrong type is a
`UserError` of one line that names the file, the key and the fix. Imports nothing of the project but the error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shd_diffusion.errors import UserError


class Section(BaseModel):
    """A section of a config: unknown keys are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class DataConfig(Section):
    """What the models are trained on; `DATA_KEYS` says which keys a data set needs, and which it takes."""

    name: Literal["digits", "fashion_mnist", "cifar10", "image_folder", "huggingface", "latents"] = "digits"
    path: str | None = None
    image_size: int | None = Field(None, ge=1)
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    horizontal_flip: bool = False
    verify: bool = True
    num_workers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _keys_belong_to_the_data_set(self) -> DataConfig:
        needed, taken = DATA_KEYS[self.name]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"`{self.name}` needs the key `{key}`; add it")
        for key, field in type(self).model_fields.items():
            if key not in {"name", "num_workers", *needed, *taken} and getattr(self, key) != field.default:
                raise ValueError(f"`{self.name}` takes no key `{key}`; remove it")
        return self


# By data set: keys that it needs, and keys that it also takes.
DATA_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "digits": (set(), set()),
    "fashion_mnist": (set(), {"path", "split", "horizontal_flip"}),
    "cifar10": ({"path"}, {"split", "horizontal_flip"}),
    "image_folder": ({"path", "image_size"}, {"horizontal_flip"}),
    "huggingface": ({"path", "image_size"}, {"split", "image_column", "label_column", "horizontal_flip"}),
    "latents": ({"path"}, {"horizontal_flip", "verify"}),
}


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


Objective = Literal["epsilon", "v_prediction", "sample", "flow"]


class DiffusionConfig(Section):
    """The forward process, what the denoiser predicts, and how its timesteps are drawn and weighed.

    `flow` is rectified flow: straight paths from image to noise, without a `beta_schedule`. With
    `learned_variance` the model predicts twice the channels, the second half trained by the variational bound.
    """

    objective: Objective = "epsilon"
    num_train_timesteps: int = Field(1000, ge=2)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    learned_variance: bool = False
    min_snr_gamma: float | None = Field(None, gt=0)
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"

    @model_validator(mode="after")
    def _variance_has_a_bound(self) -> DiffusionConfig:
        if self.learned_variance and self.objective == "flow":
            raise ValueError(
                "a variance cannot be learned with the objective `flow`; set learned_variance: false"
            )
        return self


class TermConfig(Section):
    """One summand of the loss. Weight 0 leaves the term out: it is neither computed nor logged."""

    weight: float = Field(1.0, ge=0)


class SHDConfig(TermConfig):
    """The SHD term (docs/method.md sections 3 to 6)."""

    temperature: float = Field(1.0, gt=0)
    layer_map: Literal["uniform", "last", "first"] | list[int | None] | dict[str, str] = "uniform"
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "adaptive_kl", "mse"] = (
        "forward_kl"
    )
    pairing: Literal["adjacent", "matched"] | list[list[list[int]]] = "adjacent"
    granularity: Literal["sample", "row"] = "sample"
    merge: Literal["progressive", "joint"] = "progressive"
    coefficient: Literal["closed_form", "mean", "select"] = "closed_form"
    assignment: Literal["order", "optimal"] = "order"
    calibration_batches: int = Field(4, ge=1)
    rows: float = Field(1.0, gt=0, le=1)
    coefficient_rows: Literal["all", "sampled"] = "all"
    timesteps: list[int] | None = Field(None, min_length=2, max_length=2)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    every: int = Field(1, ge=1)
    chunk_rows: int | None = Field(None, ge=1)
    compile: bool = False

    @model_validator(mode="after")
    def _timesteps_are_a_range(self) -> SHDConfig:
        if self.timesteps is not None and self.timesteps[0] > self.timesteps[1]:
            raise ValueError(
                f"`timesteps` {self.timesteps} end before they begin; give the first and the last"
            )
        return self


class MappedTermConfig(TermConfig):
    """A term on pairs of blocks."""

    layer_map: Literal["uniform", "last", "first"] | list[int | None] | dict[str, str] = "uniform"


class VkDConfig(MappedTermConfig):
    """VkD: features of the teacher are whitened (for generation) or standardised (for classification)."""

    normalisation: Literal["whiten", "standardise"] = "whiten"


class AttentionMSEConfig(MappedTermConfig):
    """Squared error between attention logits: of `equal` head counts head by head, or of the heads' `average`."""

    heads: Literal["equal", "average"] = "average"


class LossesConfig(Section):
    """The terms of the loss, each with its weight; `variance` counts with a learned variance only.

    L = w_denoise · L_denoise + w_output · L_output + w_shd · L_SHD + the baselines that SHD is compared with.
    With `balance` a term's weight is a multiple of the denoising term's gradient on the model's last block.
    """

    denoise: TermConfig = TermConfig(weight=1.0)
    variance: TermConfig = TermConfig(weight=1.0)
    output: TermConfig = TermConfig(weight=1.0)
    shd: SHDConfig = SHDConfig(weight=1.0)
    features: MappedTermConfig = MappedTermConfig(weight=0.0)
    vkd: VkDConfig = VkDConfig(weight=0.0)
    attention_output: MappedTermConfig = MappedTermConfig(weight=0.0)
    attention_mse: AttentionMSEConfig = AttentionMSEConfig(weight=0.0)
    aligner: TermConfig = TermConfig(weight=0.0)
    balance: bool = False

    @model_validator(mode="after")
    def _every_step_has_a_loss(self) -> LossesConfig:
        always = (term.weight for name, term in self if name not in ("balance", "variance", "shd"))
        if not any(always) and not (self.shd.weight and self.shd.every == 1):
            raise ValueError("there are steps without any term; give `denoise` a weight above 0")
        return self


class WatchConfig(Section):
    """A few samples and their Fréchet distance every so many steps while training; 0 switches it off."""

    every: int = Field(0, ge=0)
    num_images: int = Field(500, ge=2)
    num_inference_steps: int = Field(10, ge=1)


class TrainConfig(Section):
    """The optimisation. `batch_size` is per process and forward pass, as accelerate counts.

    With a `mask_ratio` every batch is seen twice, once with at least that share of its tokens dropped (MDTv2).
    """

    max_steps: int = Field(..., ge=1)
    batch_size: int = Field(..., ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    label_drop: float = Field(0.1, ge=0, lt=1)
    mask_ratio: float = Field(0.0, ge=0, lt=0.8)
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
    trackers: list[Literal["tensorboard", "wandb"]] = []
    watch: WatchConfig = WatchConfig()


class SampleConfig(Section):
    """Sampling by a diffusers pipeline. Image j follows from (seed, j), and so does its label, if `random`.

    `pass_size` images go through the model at once: a library's rounding depends on it, so it is part of the
    protocol. `batch_size`, how many images a process takes on at a time, in whole passes, changes no image.
    """

    num_images: int = Field(1000, ge=1)
    labels: Literal["balanced", "random"] = "balanced"
    num_inference_steps: int = Field(25, ge=1)
    scheduler: str = "DDIMScheduler"
    scheduler_arguments: dict[str, Any] = {}
    guidance_scale: float = Field(1.0, ge=0)
    guidance_power: float | None = Field(None, gt=0)
    guidance_interval: list[int] | None = Field(None, min_length=2, max_length=2)
    guidance_channels: int | None = Field(None, ge=1)
    pass_size: int = Field(32, ge=1)
    batch_size: int = Field(100, ge=1)
    seed: int = Field(0, ge=0)


class EvaluateConfig(Section):
    """The metrics, the features that they are computed on, and what the images are compared with.

    Without an `extractor` the data set decides; without `metrics` all usual ones are computed that can be.
    """

    extractor: str | None = None
    extractor_weights: str | None = None
    reference: str | None = None
    metrics: list[str] | None = None
    resize: Literal["none", "box", "bilinear", "bicubic", "lanczos"] = "none"
    batch_size: int = Field(default=100, ge=1)


class EvaluationConfig(Section):
    """`evaluate` of what is no run: images, or a pipeline that is sampled first."""

    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class RunConfig(Section):
    """What the training of a teacher and a distillation share."""

    seed: int = Field(0, ge=0)
    output: str | None = None
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class TrainTeacherConfig(RunConfig):
    """`train-teacher`: a model on the denoising loss alone."""

    model: ModelConfig


class DistillConfig(RunConfig):
    """`distill`: a student from a teacher."""

    teacher: TeacherConfig
    student: StudentConfig
    losses: LossesConfig = LossesConfig()


class EncodeConfig(Section):
    """How `prepare` encodes images into a cache of latents.

    `max_corrupt_share`: of the images that may be unreadable and left out, before that is an error.
    """

    vae: str
    batch_size: int = Field(16, ge=1)
    shard_size: int = Field(4096, ge=1)
    dtype: Literal["float32", "float16"] = "float32"
    max_corrupt_share: float = Field(0.001, ge=0, le=1)


class PrepareConfig(Section):
    """`prepare`: a cache of latents from images."""

    output: str | None = None
    data: DataConfig
    prepare: EncodeConfig


# --- reading -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2: PyYAML reads `2e-3` as a string and `no` as false, which nobody means."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- the name that PyYAML looks for
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


def parse_yaml(text: str) -> Any:
    """A YAML document as plain Python objects.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


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
    kind: type[TrainTeacherConfig] | type[DistillConfig] = (
        DistillConfig if "student" in tree else TrainTeacherConfig
    )
    return parse_config(tree, kind, source=str(path))


def override_config(config: AnyConfig, overrides: Iterable[str], source: str) -> AnyConfig:
    """The same config with `dotted.key=value` overrides; errors as for `read_config`."""
    tree = config.model_dump(mode="json", by_alias=True)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, type(config), source)


def parse_config(tree: dict[str, Any], kind: type[AnyConfig], source: str) -> AnyConfig:
    """Check a tree of plain values against a config model; `source` is the name used in messages."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, kind)}") from None


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; reading it back gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a config file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, see configs/ for examples")
    return tree


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
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML; quote it") from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first finding in one line: the key, what is wrong, what was meant."""
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location if not _is_union_tag(part))
    if first["type"] == "extra_forbidden":
        known = _keys_beside(kind, location)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    if first["type"] == "missing":
        return f"key `{key}` is missing; add it"
    if first["type"] == "value_error":
        return f"key `{key}`: {first['ctx']['error']}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"key `{key}` is {first['input']!r}: {message}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("list", "str", "int", "float"))


def _keys_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section in which the unknown key stands."""
    for part in location[:-1]:
        field = next((f for n, f in kind.model_fields.items() if part in (n, f.alias)), None)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return [field.alias or name for name, field in kind.model_fields.items()]
