"""What a diffusers text-to-image pipeline tells its denoiser about a prompt.

Nothing here knows how a family makes its embeddings. A pipeline's own `__call__` is run with a recorder in the
denoiser's place and stopped at the scheduler's first step: lengths, masks, templates, pooled vectors, zeroed negative
prompts and micro-conditions are the pipeline's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.factory import DENOISERS, denoiser_part, model_class
from shd_diffusion.models.families import TEXT_MASK, Family, family_of
from shd_diffusion.models.first_step import until_first_step
from shd_diffusion.models.pipeline_call import call_defaults

_PROBES = ("a", " ".join(string.ascii_lowercase * 2))  # a short prompt and a long one
_ROUNDING = (
    0.03  # of a condition's norm: an encoder in bfloat16 is off by 0.01 where its kernels depend on the batch
)


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The component that denoises: `transformer` or `unet`.

    Raises:
        UserError: it has neither.
    """
    if name := denoiser_part([name for name, part in pipeline.components.items() if part is not None]):
        return name
    raise UserError(
        f"a {type(pipeline).__name__} has no denoiser: a text-to-image pipeline has a `transformer` or a `unet`"
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context in which diffusers and transformers do not warn: of prompts that nobody has written."""
    import transformers  # which pipelines that take prompts need

    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


class PromptEncoder:
    """Prompts as conditions of a pipeline's denoiser.

    A condition is a dict of tensors without a batch axis, on the CPU, by argument of the denoiser (a dot nests): see
    `predict`. Arguments that follow from the sample's shape alone are not among them. A prompt's condition does not
    depend on which prompts are encoded beside it: where a pipeline pads to the longest of a batch, prompts are encoded
    one by one, and their lengths differ (`pad` stacks them).

    The denoiser itself is not run. It may be on the meta device, see `load_for_prompts`.

    Args:
        pipeline: text to image or video; left as it is.
        size: height and width of the images in pixels.
        arguments: further keyword arguments of the pipeline's call, such as `max_sequence_length`, `original_size` or
            `use_resolution_binning`.

    Raises:
        UserError: the pipeline has no denoiser, or its call takes no such argument.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, size: tuple[int, int], arguments: Mapping[str, Any] | None = None
    ) -> None:
        self.pipeline, self.size = pipeline, size
        self.arguments = call_defaults(type(pipeline)) | dict(arguments or {})
        self._denoiser = denoiser_name(pipeline)
        self._takes = inspect.signature(type(pipeline).__call__).parameters
        for name in self.arguments:
            if name not in self._takes:
                raise UserError(f"{type(pipeline).__name__} takes no argument `{name}`; leave it out")

    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The condition of each prompt; embedded guidance is that of scale 1."""
        batches = [[*prompts]] if self.same_in_any_batch else [[prompt] for prompt in prompts]
        return [entries for batch in batches if batch for entries in self._encode(batch)]

    @_without_warnings()
    def null(self) -> dict[str, Tensor]:
        """The condition of the pipeline's unconditional pass; where it has none, that of the empty prompt."""
        prompt, empty = [_PROBES[0]], self.encode([""])[0]
        conditional, *more = self._record(prompt, **self.without_guidance)
        if more:
            raise UserError(
                f"the call of {type(self.pipeline).__name__} makes a guided pass that no `guidance_scale` switches off"
            )
        guided = self._record(prompt, **self._guidance(2.0))
        unconditional = sorted(guided, key=lambda entries: _distance(entries, conditional))[1:]
        mask = {name: value for name, value in empty.items() if name == TEXT_MASK}
        return unconditional[0] | mask if unconditional else empty

    @functools.cached_property
    @_without_warnings()
    def without_guidance(self) -> dict[str, Any]:
        """Arguments of the pipeline's call by which it makes no unconditional pass, and embeds guidance of scale 1."""
        prompt = [_PROBES[0]]
        off = self._guidance(1.0)
        # Z-Image counts from 0: its guidance_scale is w - 1
        return off if len(self._record(prompt, **off)) == 1 else self._guidance(0.0)

    @functools.cached_property
    @_without_warnings()
    def same_in_any_batch(self) -> bool:
        """Whether a prompt's condition is the same beside a longer one."""
        one, two = (self._record(prompts, **self.without_guidance) for prompts in (_PROBES[:1], _PROBES))
        return _distance(one[0], two[0]) < _ROUNDING

    def _guidance(self, scale: float) -> dict[str, Any]:
        """Arguments of classifier-free guidance: a true scale, where `guidance_scale` is one that is embedded."""
        if "true_cfg_scale" not in self._takes:
            return {"guidance_scale": scale} if "guidance_scale" in self._takes else {}
        embeds = getattr(self.pipeline, self._denoiser).config.get("guidance_embeds")
        return (
            {"true_cfg_scale": scale}
            | ({"negative_prompt": ""} if scale > 1 else {})
            | ({"guidance_scale": 1.0} if embeds else {})
        )

    def _encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Conditions, with the mask of their text where the denoiser is told none."""
        family = family_of(getattr(self.pipeline, self._denoiser))
        masks: dict[str, Tensor] = {}
        found = self._record(prompts, masks if family.text else None, **self.without_guidance)
        if not family.text or any(name not in masks for name in family.text):  # an encoder may be left out
            return found
        mask = torch.cat([masks[name].bool().cpu() for name in family.text], 1)
        mask = F.pad(mask, (family.registers, 0), value=True)
        return [entries | {TEXT_MASK: own} for entries, own in zip(found, mask, strict=True)]

    def call(self, **guidance: Any) -> dict[str, Any]:
        """All that the pipeline's call is given beside prompts."""
        height, width = self.size
        return {"height": height, "width": width, "num_inference_steps": 2, **guidance, **self.arguments}

    def _record(
        self, prompts: Sequence[str], masks: dict[str, Tensor] | None = None, **guidance: Any
    ) -> list[dict[str, Tensor]]:
        """A condition for each sample that the denoiser is given in the first step."""
        family = family_of(getattr(self.pipeline, self._denoiser))
        calls = first_step(self.pipeline, [*prompts], masks, **self.call(**guidance)).calls
        return [entries for call in calls for entries in _conditions(call, family)]


@dataclass(frozen=True)
class FirstStep:
    """A pipeline's call up to its scheduler's first step.

    Attributes:
        calls: the arguments of the denoiser's calls, by name.
        predicted: what its last one gave, made-up numbers.
        told: the scheduler: what was predicted, the timestep, and the noised sample.
    """

    calls: list[dict[str, Any]]
    predicted: Any
    told: list[Any]


def first_step(
    pipeline: DiffusionPipeline, prompts: list[str], masks: dict[str, Tensor] | None = None, **arguments: Any
) -> FirstStep:
    """What happens in the first step of a pipeline's call, without its denoiser's computing anything.

    The pipeline's parts are left as they are: a copy runs, with a recorder for a denoiser.

    Args:
        masks: takes, by tokenizer, which of the prompts' tokens (B, L) are no padding.
    """
    name = denoiser_name(pipeline)
    running = copy.copy(pipeline)
    recorder = running.__dict__[name] = _Recorder(getattr(pipeline, name), _device(pipeline))
    if masks is not None:
        for part in (part for part in pipeline.components if part.startswith("tokenizer")):
            if getattr(pipeline, part) is not None:
                running.__dict__[part] = _NotingTokenizer(getattr(pipeline, part), masks, part, len(prompts))
    running.set_progress_bar_config(disable=True)
    with until_first_step(running) as told:
        running(prompt=prompts, **arguments)
    return FirstStep(recorder.calls, recorder.predicted, told)


def _device(pipeline: DiffusionPipeline) -> torch.device:
    """Where the text encoders are."""
    parts: dict[str, Any] = pipeline.components
    models = (part for name, part in parts.items() if name not in DENOISERS and isinstance(part, nn.Module))
    return next((torch.device(str(part.device)) for part in models), torch.device("cpu"))


class _Recorder(nn.Module):
    """Stands in for a denoiser: notes what it is called with, has its config and methods, predicts made-up numbers."""

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device = device  # whatever the denoiser's, which may be meta
        self.__dict__["denoiser"] = denoiser
        self.calls: list[dict[str, Any]] = []
        self.predicted: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["denoiser"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(self.denoiser.forward)
        given = signature.bind(*args, **kwargs).arguments
        self.calls.append(dict(given))
        sample = next(iter(given.values()))
        self.predicted = [_made_up(x) for x in sample] if isinstance(sample, list) else _made_up(sample)
        return Transformer2DModelOutput(sample=self.predicted)


def _made_up(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 in a tensor's shape, the same ones each time."""
    return torch.arange(like.numel(), dtype=torch.float64).sin().view(like.shape).to(like)


class _NotingTokenizer:
    """A tokenizer that notes the attention mask (B, L) of B prompts, as they are padded: of its first call, or of its
    first calls where these are of one prompt each (FLUX.2-klein's)."""

    def __init__(self, tokenizer: Any, masks: dict[str, Tensor], name: str, prompts: int) -> None:
        self.tokenizer, self.masks, self.name, self.prompts = tokenizer, masks, name, prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(self.tokenizer(*args, **kwargs))

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(self.tokenizer.apply_chat_template(*args, **kwargs))

    def _noted(self, found: Any) -> Any:
        if isinstance(found, Mapping) and "attention_mask" in found:
            mask = found["attention_mask"]
            before = self.masks.setdefault(self.name, mask)
            more = before is not mask and len(before) < self.prompts and before.shape[1:] == mask.shape[1:]
            if more and len(mask) == 1:
                self.masks[self.name] = torch.cat([before, mask])
        return found


def _conditions(call: Mapping[str, Any], family: Family) -> list[dict[str, Tensor]]:
    """The condition of each sample of a call: what has an entry a sample and does not follow from its shape."""
    given = iter(call.items())
    samples = len(next(given)[1])
    flat: dict[str, Any] = {}
    for name, value in given:
        inner = (
            {f"{name}.{key}": entry for key, entry in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        flat |= {key: entry for key, entry in inner.items() if key not in (family.timestep, *family.derived)}
    by_sample = {
        name: value
        for name, value in flat.items()
        if (isinstance(value, Tensor) and value.ndim and len(value) == samples)
        or (isinstance(value, list) and len(value) == samples and all(isinstance(v, Tensor) for v in value))
    }
    return [
        family.condition({name: value[i].detach().cpu() for name, value in by_sample.items()})
        for i in range(samples)
    ]


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry of two conditions, in norms of the second's; infinite where shapes differ."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    differences = [
        torch.dist(one[name].double(), entry.double()) / entry.double().norm().clamp(min=1e-9)
        for name, entry in other.items()
    ]
    return max((difference.item() for difference in differences), default=0.0)


# --- pipelines without their denoiser -----------------------------------------------------------------------------


def load_for_prompts(
    path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiffusionPipeline:
    """A pipeline by its folder or hub name, whose denoiser has a config and no weights (meta device).

    Neither is the denoiser's file read or downloaded.

    Args:
        dtype: of the text encoders' weights, and so of what they give.
        device: where the text encoders compute.

    Raises:
        UserError: there is none, or no text-to-image pipeline of diffusers.
    """
    try:
        index = DiffusionPipeline.load_config(path)
        name = denoiser_part(index)
        if name is None:
            raise ValueError(f"a {index.get('_class_name')} has none of transformer, unet")
        parts = [part for part, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
        if Path(path).is_dir() and (lacking := [part for part in parts if not (Path(path) / part).is_dir()]):
            raise ValueError(f"its folder `{lacking[0]}` is missing")  # a tokenizer would be made of nothing
        kind: Any = model_class(index[name][1])
        config = kind.load_config(path, subfolder=name)
        with init_empty_weights():
            denoiser = kind.from_config(config).eval()
        # the class itself, since `DiffusionPipeline` loads again what an optional argument gives
        kind = getattr(diffusers, index["_class_name"])
        pipeline: DiffusionPipeline = kind.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **{name: denoiser}
        )
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not denoiser:
                part.to(device)
        return pipeline
    except Exception as error:  # of many kinds: files that are missing, torn or of another library
        where = "" if Path(path).exists() else ", neither here nor on the hub"
        raise UserError(
            f"{path}: no text-to-image pipeline can be loaded{where} ({one_line(error)}); "
            "give a folder or hub name of one that diffusers loads"
        ) from error
