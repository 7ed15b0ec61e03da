"""A diffusers pipeline on disk or on the hub, told from its model_index.json: no weights are loaded for it."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import snapshot_download

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_json, sha256, write_json
from shd_diffusion.models.factory import DENOISERS, denoiser_part, find_model_folder
from shd_diffusion.models.hub import try_hub

INDEX = "model_index.json"
READ = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""The files of a text encoder or tokenizer that are read; repositories have the same weights in other formats too."""

NOT_OF_PROMPTS = {*DENOISERS, "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder"}


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline that a model stands in.

    Attributes:
        name: its folder or hub name.
        index: its model_index.json.
        part: what it calls its denoiser.
    """

    name: str
    index: dict[str, Any]
    part: str

    @property
    def pipeline_class(self) -> type[DiffusionPipeline] | None:
        """Its class, where that is one of diffusers."""
        found = getattr(diffusers, str(self.index.get("_class_name")), None)
        return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None

    @property
    def takes_prompts(self) -> bool:
        """Whether its images are made from prompts."""
        kind = self.pipeline_class
        return kind is not None and "prompt" in inspect.signature(kind.__call__).parameters

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of what its model was trained on, where it says that."""
        shape = self.index.get("sample_shape")
        return None if shape is None else tuple(int(size) for size in shape)

    def has(self, part: str) -> bool:
        """Whether it has a part of this name."""
        entry = self.index.get(part)
        return isinstance(entry, list) and bool(entry) and bool(entry[0])

    def local(self, parts: Collection[str] | None = None) -> Path:
        """Its folder; what the hub has of it, or of some `parts` alone, is brought here first.

        Raises:
            UserError: it cannot be brought.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        try:
            if parts is None:
                return Path(DiffusionPipeline.download(self.name, use_safetensors=True))
            wanted = [f"{part}/*{suffix}" for part in parts for suffix in READ]
            return Path(snapshot_download(self.name, allow_patterns=wanted, ignore_patterns=["*.fp16.*"]))
        except Exception as error:  # the hub's client raises errors of any kind
            raise UserError(f"{self.name}: cannot be had from the hub ({one_line(error)})") from error

    def load_scheduler(self) -> SchedulerMixin | None:
        """Its scheduler; None where it has none of diffusers.

        Raises:
            UserError: it is damaged.
        """
        kind = getattr(diffusers, str((self.index.get("scheduler") or [None, ""])[1]), None)
        if kind is None:
            return None
        try:
            return kind.from_pretrained(self.name, subfolder="scheduler")
        except Exception as error:  # diffusers raises errors of any kind on damaged files
            raise UserError(f"{self.name}: its scheduler cannot be loaded ({one_line(error)})") from error

    def hash_prompt_parts(self) -> str:
        """SHA-256 of all that prompts are encoded by: text encoders, tokenizers, templates, the pipeline's options.

        By their files, since text encoders can be larger than the memory that training has left.
        """
        parts = sorted(name for name in self.index if name not in NOT_OF_PROMPTS and self.has(name))
        folder = self.local(parts)
        options = {name: value for name, value in self.index.items() if not isinstance(value, list)}
        options.pop("_diffusers_version", None)
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        for part in parts:
            for file in sorted((folder / part).rglob("*")):
                if file.suffix in READ and ".fp16." not in file.name:
                    digest.update(f"{file.relative_to(folder)} {sha256(file)}".encode())
        return digest.hexdigest()

    def save_with(self, model: ModelMixin, to: Path) -> None:
        """Write this pipeline with another denoiser: the other parts are copied as they are, file by file, with
        the code and licences beside them; no samples, and no words on its own denoiser."""
        folder = self.local()

        def others(at: str, names: list[str]) -> list[str]:
            return [name for name in names if Path(at) == folder and not self._goes_along(name)]

        shutil.copytree(folder, to, ignore=others, dirs_exist_ok=True)
        model.save_pretrained(to / self.part, safe_serialization=True)
        kind = type(model)
        library = "diffusers" if getattr(diffusers, kind.__name__, None) is kind else kind.__module__
        write_json(to / INDEX, {**self.index, self.part: [library, kind.__name__]})

    def _goes_along(self, name: str) -> bool:
        """Whether something in its folder is none of its denoiser's own."""
        part = name != self.part and self.has(name)
        return part or name.endswith(".py") or name.upper().startswith(("LICENSE", "NOTICE"))


def find_pipeline(name: str) -> PipelineFolder | None:
    """The pipeline around a model: of a run, a pipeline folder, a model folder inside one, or a hub name.

    Raises:
        UserError: its model_index.json cannot be read, or it has two denoisers.
    """
    folder = find_model_folder(Path(name))
    if folder is not None:
        file = folder.parent / INDEX
        if not file.is_file():
            return None
        index = read_json(file)
        parts = ("vae", "scheduler", *DENOISERS)
        if not isinstance(index, dict) or not all(
            isinstance(index[part], list) and len(index[part]) == 2 for part in parts if part in index
        ):
            raise UserError(f"{file}: not the index of a pipeline; save the pipeline anew")
        return _of_one(PipelineFolder(str(folder.parent), index, folder.name))
    if Path(name).is_dir() or not try_hub(name):
        return None
    try:
        index = dict(DiffusionPipeline.load_config(name))
    except Exception as error:  # the hub's client raises errors of any kind
        raise UserError(f"{name}: no such pipeline here or on the hub ({one_line(error)})") from error
    part = denoiser_part(index)
    return None if part is None else _of_one(PipelineFolder(name, index, part))


def _of_one(pipeline: PipelineFolder) -> PipelineFolder:
    """The pipeline, if one model denoises in it.

    Raises:
        UserError: there are two, such as Wan 2.2's experts for the noisier and the cleaner timesteps.
    """
    second = f"{pipeline.part}_2"
    if pipeline.has(second):
        raise UserError(
            f"{pipeline.name}: has two denoisers, `{pipeline.part}` and `{second}`, each for some of the timesteps; "
            "pipelines of one can be distilled and compressed"
        )
    return pipeline
