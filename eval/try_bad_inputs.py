"""Hundreds of bad inputs through the commands: each must be refused in one line, with exit code 2, and write nothing.

    python eval/try_bad_inputs.py --output docs/results/bad-inputs.json

A small world is made once (a teacher, its student, images, a cache, statistics). A case damages one file of it, or
gives one command something bad; then all files are hashed again. The cases are tables of what is bad, times the
commands that read it. All run in one process, since torch takes seconds to import.
"""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from shd_diffusion.environment import describe_environment
from shd_diffusion.files import sha256, write_json

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "digits"
SHORT = ("train.max_steps=2", "train.batch_size=4", "train.log_every=1", "sample.num_inference_steps=2")


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        group: what kind of thing is bad about it.
        name: what exactly.
        command: the command line; `@` is the folder of the world.
        damage: what is done to a file of the world first, and undone afterwards.
        damaged: the file.
        may_pass: what is bad may not matter to the command; then it may do its work.
    """

    group: str
    name: str
    command: str
    damage: Callable[[Path], object] | None = None
    damaged: str | None = None
    may_pass: bool = False


def run(arguments: list[str]) -> tuple[int, str, BaseException | None]:
    """The exit code of a command line in this process, its standard error, and the exception that it ended with."""
    from typer.testing import CliRunner

    from shd_diffusion.cli import app

    result = CliRunner().invoke(app, arguments)
    fault = None if isinstance(result.exception, SystemExit) else result.exception
    return result.exit_code, result.stderr, fault


def sets(*overrides: str) -> list[str]:
    """Overrides as arguments of the command line."""
    return [part for override in overrides for part in ("--set", override)]


# --- the world ---------------------------------------------------------------------------------------------------


def make_world(world: Path) -> None:
    """A teacher and a student of two steps, sampled and evaluated; images, a VAE and a cache; statistics."""
    teacher, student = str(world / "teacher"), str(world / "student")
    small = ("model.arguments.num_layers=1", "model.arguments.num_attention_heads=4")
    like = ("student.arguments.num_layers=1", "student.arguments.num_attention_heads=2")
    done(["train-teacher", str(CONFIGS / "teacher.yaml"), "--output", teacher, *sets(*SHORT, *small)])
    of_teacher = f"teacher.path={teacher}"
    done(["distill", str(CONFIGS / "distill.yaml"), "--output", student, *sets(*SHORT, *like, of_teacher)])
    done(["sample", teacher, student, *sets("sample.num_images=12")])
    done(["evaluate", teacher, student])
    write_images(world / "images")
    write_vae(world / "vae")
    (world / "prepare.yaml").write_text(
        f"data: {{name: image_folder, path: {world / 'images'}, image_size: 16}}\nprepare: {{vae: {world / 'vae'}}}\n"
    )
    done(["prepare", str(world / "prepare.yaml"), "--output", str(world / "cache")])
    np.savez(world / "images.npz", np.zeros((12, 8, 8, 3), np.uint8))
    (world / "empty").mkdir()
    (world / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(world / "photos" / "photo.jpg")
    (world / "page.html").write_text("<p>mine</p>")


def done(arguments: list[str]) -> None:
    """Run a command that must succeed."""
    code, said, fault = run(arguments)
    if code:
        raise RuntimeError(f"{arguments}: {said}") from fault


def write_images(folder: Path) -> None:
    """Twelve images of two classes."""
    draws = np.random.default_rng(0)
    for index in range(12):
        path = folder / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def write_vae(folder: Path) -> None:
    """The smallest VAE."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=2, sample_size=16
    ).save_pretrained(folder)


# --- configs -----------------------------------------------------------------------------------------------------

NO_NUMBERS = (".inf", "-.inf", ".nan", "1e400", "-1", "many", "[1]", "{}", "null")
NO_COUNTS = ("0", "-1", "1.5", "1000000000000", "9" * 30, ".inf", "many", "[1]", "true")

BAD_VALUES: dict[str, tuple[str, ...]] = {
    "train.learning_rate": (*NO_NUMBERS, "0", "1e39"),
    "train.weight_decay": NO_NUMBERS,
    "train.max_grad_norm": ("-1", "0", ".nan", "many"),
    "train.ema_decay": (".nan", "1", "1.5", "-0.1", "many"),
    "train.condition_dropout": (".nan", "1", "-0.1"),
    "train.max_steps": NO_COUNTS[1:],
    "train.batch_size": NO_COUNTS,
    "train.micro_batch_size": ("0", "-1", "1.5"),
    "train.guidance_range": ("[1]", "[.nan, 1]", "[1, 2]", "5"),
    "train.lr_schedule": ("sudden", "5", "null"),
    "train.mixed_precision": ("int8", "fp16", "16"),
    "train.num_processes": ("7", "0", "-1"),
    "train.trackers": ("[ledger]", "tensorboard"),
    "train.validation.every": ("-1", "1.5"),
    "train.shard": ("true", "maybe"),
    "seed": ("-1", "9223372036854775808", "99999999999999999999", "1.5", "x"),
    "losses.shd.weight": NO_NUMBERS,
    "losses.output.weight": (".inf", ".nan", "-1"),
    "losses.shd.temperature": (*NO_NUMBERS, "0"),
    "losses.shd.timesteps": ("[800, 200]", "[5000, 9000]", "[1]", "[a, b]", "[-5, 10]"),
    "losses.shd.rows": ("0", "2", ".nan"),
    "losses.shd.divergence": ("far", "1"),
    "losses.shd.pairing": ("[[[0]]]", "[[[0, 9]]]", "[[0, 1]]", "[[[0, 1], [0, 2]]]", "closest"),
    "losses.shd.layer_map": ("sideways", "[0, 1, 2]"),
    "losses.shd.every": ("0", "-1"),
    "losses.typo": ("{weight: 1}",),
    "sample.num_images": NO_COUNTS,
    "sample.num_inference_steps": ("0", "5000", "-1", "1.5"),
    "sample.guidance_scale": (".inf", ".nan", "-1"),
    "sample.guidance_power": (".inf", ".nan", "0"),
    "sample.guidance_interval": ("[900, 1]", "[1]", "[a, b]"),
    "sample.scheduler": ("Nope", "DiTTransformer2DModel", "FlowMatchEulerDiscreteScheduler", "5"),
    "sample.scheduler_arguments": (
        "{eta: 1}",
        "{timestep_spacing: 7}",
        "{timestep_spacing: wide}",
        "{beta_start: .nan}",
        "{steps_offset: 2001-01-01}",
        "[]",
    ),
    "sample.seed": ("-1", "9223372036854775808", "x"),
    "sample.dtype": ("int8",),
    "evaluate.extractor": ("foo", "clip", "5"),
    "evaluate.extractor_weights": ("nowhere.safetensors",),
    "evaluate.metrics": ("[fd]", "fid", "[1]"),
    "evaluate.reference": ("nowhere",),
    "evaluate.batch_size": ("0", "1000000000000"),
    "evaluate.clip_model": ("nowhere/at/all",),
    "data.name": ("digit", "latents", "image_folder", "5", "prompts"),
    "data.path": ("somewhere",),
    "data.num_workers": ("-1", "1000000000"),
    "diffusion.objective": ("noise", "flow", "v_prediction"),
    "diffusion.num_train_timesteps": ("0", "1", "100", ".inf"),
    "diffusion.beta_start": (".nan", "0", "2"),
    "student.class": ("NoModel", "AutoencoderKL", "5", "../x"),
    "student.arguments.num_attention_heads": ("0", "-5", "1000000000", "5", "'12'", ".nan", "2.5"),
    "student.arguments.attention_head_dim": ("0", "-8", "1000000"),
    "student.arguments.num_layers": ("-1", "x"),
    "student.arguments.patch_size": ("0", "3", "-2", "100"),
    "student.arguments.sample_size": ("0", "x"),
    "student.arguments.in_channels": ("0", "3"),
    "student.arguments.num_embeds_ada_norm": ("0", "7", "1000"),
    "student.arguments.dropout": (".nan", "2", "-1", "x"),
    "student.arguments.activation_fn": ("zzz", "5"),
    "student.arguments.norm_type": ("zzz",),
    "student.arguments.depth": ("3",),
    "student.init": ("magic",),
    "student.pretrained": ("nowhere", "[nowhere]", "[nowhere, nowhere]"),
    "teacher.path": (
        "nowhere",
        "nowhere/at/all",
        "x" * 300,
        "''",
        "5",
        "'a\nb'",
        "@/empty",
        "@/page.html",
    ),
    "teacher.dtype": ("int8",),
    "teacher.device": ("moon",),
    "": ("train", "=5", "nonsense"),
    "train": ("5", "null", "[]"),
    "train.max_step": ("3",),
    "prepare": ("{}", "{output: x, batch_size: 0}"),
}
"""Values of a distillation's config that must be refused, by key."""

BAD_YAML = {
    "empty": "",
    "a list": "- 1\n",
    "a text": "hello\n",
    "a number": "5\n",
    "a tab": "train:\n\tmax_steps: 3\n",
    "not closed": "train: {max_steps: 3\n",
    "a key twice": "train: {max_steps: 3}\nmodel: {}\ntrain: {batch_size: 2}\n",
    "brackets": "[" * 5000,
    "braces": "a: " + "{a: " * 2000,
    "digits": "a: " + "9" * 5000,
    "no such day": "seed: 2001-99-99\n",
    "a day": "seed: 2001-01-01\n",
    "bomb": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 20)),
    "bomb as a value": "seed: &a [x, x]\n" + "base: x\n",
    "holds itself": "a: &a [*a]\n",
    "python": "a: !!python/object/apply:os.system ['true']\n",
    "unknown alias": "a: *nowhere\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "its own base": "base: bad.yaml\n",
    "a base that is none": "base: [1]\n",
    "no such base": "base: nowhere.yaml\n",
    "binary": "\x00\x01\x02",
    "no key": "? [1, 2]\n: 3\n",
    "null keys": "~: 3\n",
}

SETS = shlex.join(sets(*SHORT))
TRAIN, DISTILL = f"train-teacher {CONFIGS}/teacher.yaml {SETS}", f"distill {CONFIGS}/distill.yaml {SETS}"
PREPARE, COMPRESS = "prepare @/prepare.yaml", "compress @/teacher --output @/out"
TOO_LONG = "x" * 300

BAD_ARGUMENTS = {
    "runs that are none": [
        *(
            f"{stage} @/{what}"
            for stage in ("sample", "report", "evaluate")
            for what in ("none", "page.html", "empty")
        ),
        "squeeze @/empty --heads 2",
        *(f"inspect @/{what}" for what in ("none", "page.html", "empty")),
        "inspect @/teacher --student @/none",
        "convert @/page.html --from dit --to @/out",
        "convert @/none --from mdtv2 --to @/out",
        "compare @/page.html @/page.html",
        "compare @/none @/none",
        "study @/none.yaml",
        "study @/prepare.yaml",
        "prepare @/none.yaml",
        "train-teacher @",
        f"inspect {TOO_LONG}",
        "inspect a/b/c",
        "inspect 'a\nb'",
    ],
    "options": [
        *(f"squeeze @/teacher --heads {heads}" for heads in ("0", "9", "two", "''", "-1")),
        "sample @/teacher @/student --output @/out",
        "sample @/teacher --prompts @/none.txt",
        "sample @/teacher --prompts @/page.html",
        "sample @/teacher --layout geneval",
        "sample @/teacher --set sample.seed=1",
        *(
            f"sample @/teacher --output @/out --set sample.{bad}"
            for bad in ("num_inference_steps=5000", "scheduler=Nope", "typo=1", "pass_size=0", "prompts=5")
        ),
        *(
            f"evaluate @/teacher --{bad}"
            for bad in (
                "metrics fd",
                "extractor foo",
                "extractor-weights @/none",
                "extractor-weights @/page.html",
                "reference @/none",
                "reference @/page.html",
                "reference @/photos",
                "output @/out",
                "set evaluate.against_teacher=2",
                "set evaluate.batch_size=0",
            )
        ),
        "evaluate @/student --set evaluate.against_teacher=1000",
        "evaluate @/images.npz",
        "evaluate @/photos --reference digits --extractor digits-classifier",
        "compress @/teacher",
        "compress @/teacher --heads 2 --dry-run",
        "compress @/vae --output @/out --heads 2",
        *(
            f"{COMPRESS} --{bad}"
            for bad in (
                "heads 9",
                "heads 0",
                "heads -1",
                "heads nan",
                "neurons inf",
                "neurons 0",
                "blocks 7",
                "budget macs",
                "budget joy=0.5",
                "budget macs=nan",
                "budget macs=2",
                "budget macs=0.5 --heads 2",
                "heads 2 --timesteps 0,0",
                "heads 2 --timesteps a",
                "heads 2 --timesteps nan",
                "heads 2 --data @/none",
            )
        ),
    ],
    "places": [
        *(
            f"{command} --output {place}"
            for place in ("@/photos", "@/page.html", "@/page.html/x", f"@/{TOO_LONG}")
            for command in (TRAIN, PREPARE, "sample @/teacher", "compress @/teacher --heads 2 --images 64")
        ),
        "report @/teacher --output @/page.html",
        "report @/teacher --output @/page.html/x",
        "report @/teacher @/student --output @/teacher/all.html",
        "report @/student --output @/teacher/pipeline/page.html",
        "squeeze @/student --heads 1 --output @/teacher/s",
        "squeeze @/teacher --heads 2 --output @/photos",
        *(
            f"sample @/teacher --output @/{place}"
            for place in ("student/samples", "teacher", "teacher/pipeline")
        ),
        *(f"{PREPARE} --output @/{place}" for place in ("images", "images/c", "vae/c")),
        *(f"{DISTILL} --set teacher.path=@/teacher --output @/teacher{inside}" for inside in ("", "/s")),
        "compress @/teacher --heads 2 --output @/teacher/s",
        "evaluate @/teacher/pipeline --reference digits --output @/teacher/pipeline/s",
        f"{TRAIN} --output @/student",
        f"{TRAIN} --output @/teacher --set seed=1",
    ],
}
"""Commands that must be refused; `@` is the world."""


# --- files -------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, bytes | None] = {
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "a text": b'"x"',
    "cut off": None,
    "binary": bytes(range(256)),
    "brackets": b"[" * 100_000,
    "empty": b"",
}
"""What a file holds instead; None is its first half."""

ALL = tuple(DAMAGES)
NO_JSON = ("cut off", "binary", "brackets", "empty")
TENSORS = ("cut off", "binary", "empty", "a text")

LATENTS = f"{TRAIN} --output @/out --set data.name=latents --set data.path=@/cache"
SAMPLE = "sample @/teacher --output @/out --set sample.num_images=2"
PREPARED = f"{PREPARE} --output @/out"
OF_RUNS = ("sample @/teacher", "evaluate @/teacher", "report @/teacher")

READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "teacher/config.yaml": (
        ("a list", "a number", "binary", "brackets", "empty"),
        ("sample @/teacher", "evaluate @/teacher", f"{COMPRESS} --heads 2"),
    ),
    "teacher/summary.json": (ALL, ("sample @/teacher", "report @/teacher")),
    "teacher/metrics.jsonl": (("binary",), ("report @/teacher",)),
    "teacher/environment.json": (("a list", "a number", *NO_JSON), ("report @/teacher",)),
    "teacher/samples/sampling.json": (ALL, OF_RUNS),
    "teacher/samples/000000.png": (TENSORS, ("report @/teacher", "evaluate @/teacher")),
    "teacher/evaluation/metrics.json": (
        ALL,
        ("report @/teacher", "compare @/teacher/evaluation/metrics.json @/student/evaluation/metrics.json"),
    ),
    "teacher/evaluation/nearest.json": (ALL, ("report @/teacher",)),
    "student/attention.safetensors": (TENSORS, ("report @/student",)),
    "student/inputs.json": (ALL, (f"{DISTILL} --output @/student --set train.max_steps=3",)),
    "teacher/pipeline/model_index.json": (ALL, (SAMPLE,)),
    "teacher/pipeline/denoiser/config.json": (ALL, (SAMPLE, "inspect @/teacher")),
    "teacher/pipeline/scheduler/scheduler_config.json": (ALL, (SAMPLE,)),
    "teacher/pipeline/denoiser/diffusion_pytorch_model.safetensors": (
        TENSORS,
        (SAMPLE, "inspect @/teacher", f"{DISTILL} --output @/out --set teacher.path=@/teacher"),
    ),
    "cache/manifest.json": (ALL, (LATENTS, f"{PREPARE} --output @/cache")),
    "cache/shards/latents-00000.safetensors": (TENSORS, (LATENTS,)),
    "vae/config.json": (ALL, (PREPARED,)),
    "vae/diffusion_pytorch_model.safetensors": (TENSORS, (PREPARED,)),
    "images.npz": (
        TENSORS,
        ("evaluate @/images.npz --reference digits", "evaluate @/teacher --reference @/images.npz"),
    ),
    "images/a/00.png": (TENSORS, ("evaluate @/images --reference @/images --extractor digits-classifier",)),
}
"""By file: the damages that no reader may take, and the commands that read it."""


OTHER_VALUES: tuple[Any, ...] = (None, "x")

VALUES_OF = {
    "teacher/summary.json": ("report @/teacher --output @/out", SAMPLE),
    "teacher/samples/sampling.json": (
        "report @/teacher --output @/out",
        "evaluate @/teacher/samples --reference digits",
    ),
    "teacher/evaluation/metrics.json": (
        "report @/teacher --output @/out",
        "compare @/teacher/evaluation/metrics.json @/student/evaluation/metrics.json --anyway",
    ),
    "teacher/evaluation/nearest.json": ("report @/teacher --output @/out",),
    "teacher/environment.json": ("report @/teacher --output @/out",),
    "teacher/pipeline/model_index.json": (SAMPLE, "inspect @/teacher", f"{COMPRESS} --heads 2 --images 64"),
    "teacher/pipeline/denoiser/config.json": (SAMPLE, "inspect @/teacher"),
    "teacher/pipeline/scheduler/scheduler_config.json": (SAMPLE, f"{COMPRESS} --heads 2 --images 64"),
    "cache/manifest.json": (LATENTS,),
    "vae/config.json": (PREPARED,),
}
"""JSON files of which every value is exchanged for others, one by one, and the commands that read them."""

SHOWN, OF_SHOWN = ("protocol", "versions", "machine"), 3
"""What a page shows as it is, whatever it holds; so many values of it are exchanged for `report`, which is slow."""


def _npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


def _objects(path: Path) -> None:
    np.savez(path, arr_0=np.array([{}], dtype=object), allow_pickle=True)


BAD_NPZ: dict[str, Callable[[Path], object]] = {
    "no images": _npz(x=np.zeros(3)),
    "floats": _npz(arr_0=np.zeros((12, 8, 8, 3))),
    "grey": _npz(arr_0=np.zeros((12, 8, 8), np.uint8)),
    "channels first": _npz(arr_0=np.zeros((12, 3, 8, 8), np.uint8)),
    "none": _npz(arr_0=np.zeros((0, 8, 8, 3), np.uint8)),
    "one": _npz(arr_0=np.zeros((1, 8, 8, 3), np.uint8)),
    "of another size": _npz(arr_0=np.zeros((12, 9, 9, 3), np.uint8)),
    "labels of another length": _npz(arr_0=np.zeros((12, 8, 8, 3), np.uint8), arr_1=np.zeros(5, np.int64)),
    "labels that are texts": _npz(arr_0=np.zeros((12, 8, 8, 3), np.uint8), arr_1=np.array(["a"] * 12)),
    "labels in two axes": _npz(arr_0=np.zeros((12, 8, 8, 3), np.uint8), arr_1=np.zeros((12, 1), np.int64)),
    "objects": _objects,
    "mu alone": _npz(mu=np.zeros(64)),
    "mu of another width": _npz(mu=np.zeros(3), sigma=np.eye(3)),
    "mu of NaN": _npz(mu=np.full(64, np.nan), sigma=np.eye(64)),
    "mu that is text": _npz(mu=np.array(["a"]), sigma=np.eye(1)),
}


def _png(width: int, height: int) -> bytes:
    """The head of a PNG of so many pixels, of which none are there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def _picture(array: np.ndarray, kind: str = "tiff") -> Callable[[Path], object]:
    return lambda path: Image.fromarray(array).save(path, kind)


def _link(to: str) -> Callable[[Path], object]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(to)

    return link


BAD_PICTURES: dict[str, Callable[[Path], object]] = {
    "a text": partial(Path.write_text, data="no picture"),
    "nothing": partial(Path.write_bytes, data=b""),
    "a bomb": partial(Path.write_bytes, data=_png(30_000, 30_000)),
    "no pixels": partial(Path.write_bytes, data=_png(16, 16)),
    "of no size": partial(Path.write_bytes, data=_png(0, 0)),
    "a picture of SVG": partial(Path.write_text, data="<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "32 bits": _picture(np.full((16, 16), 70_000, np.int32)),
    "floats beyond 1": _picture(np.full((16, 16), 2.5, np.float32)),
    "NaN": _picture(np.full((16, 16), np.nan, np.float32)),
    "a link to nowhere": _link("nowhere.png"),
    "a link to itself": _link("00.png"),
    "a link to a folder": _link("."),
}


def cases(world: Path) -> Iterator[Case]:
    """All cases."""
    like = ("student.arguments.num_layers=1", "student.arguments.num_attention_heads=2")
    distill = f"{DISTILL} --output @/out --set teacher.path=@/teacher {shlex.join(sets(*like))}"
    for key, values in BAD_VALUES.items():
        for value in values:
            bad = f"{key}={value}" if key else value
            yield Case("values of a config", bad[:80], f"{distill} {shlex.join(sets(bad))}")
    for name, text in BAD_YAML.items():
        for stage in ("train-teacher", "distill", "prepare", "study"):
            command = f"{stage} @/bad.yaml --output @/out"
            write: Callable[[Path], object] = partial(Path.write_bytes, data=text.encode("latin-1"))
            yield Case("configs", f"{stage}: {name}", command, write, "bad.yaml")
    for group, commands in BAD_ARGUMENTS.items():
        for command in commands:
            yield Case(group, command.replace(f" {SETS}", "").replace(TOO_LONG, "xxx"), command)
    for file, (kinds, readers) in READERS.items():
        for kind in kinds:
            for command in readers:
                yield Case(
                    "damaged files", f"{file}: {kind}: {command.split()[0]}", command, _damage(kind), file
                )
    for file, readers in VALUES_OF.items():
        shown: Counter[str] = Counter()
        for place in _places(json.loads((world / file).read_text(encoding="utf-8"))):
            shown[place[0]] += 1
            pages = place[0] not in SHOWN or shown[place[0]] <= OF_SHOWN
            for value in OTHER_VALUES:
                for command in [each for each in readers if pages or not each.startswith("report")]:
                    name = f"{file}: {'.'.join(place)}: {json.dumps(value)}: {command.split()[0]}"
                    yield Case(
                        "values in files", name, command, _set_value(place, value), file, may_pass=True
                    )
    for name, write in BAD_PICTURES.items():
        for reference in ("digits", "@/images"):
            command = f"evaluate @/images --reference {reference} --extractor digits-classifier"
            yield Case("pictures", f"{name}: {reference}", command, write, "images/a/00.png")
    for name, write in BAD_NPZ.items():
        for command in (
            "evaluate @/bad.npz --reference digits --extractor digits-classifier",
            "evaluate @/teacher --reference @/bad.npz",
        ):
            yield Case("arrays", f"{name}: {command.split()[1]}", command, write, "bad.npz")


def _places(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All keys of nested mappings, from the root on."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*above, key)
            yield from _places(value, (*above, key))


def _set_value(place: tuple[str, ...], value: Any) -> Callable[[Path], object]:
    """What puts another value into a JSON file."""

    def change(path: Path) -> None:
        tree = json.loads(path.read_text(encoding="utf-8"))
        node = tree
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        path.write_text(json.dumps(tree), encoding="utf-8")

    return change


def _damage(kind: str) -> Callable[[Path], object]:
    """What puts other bytes into a file."""

    def damage(path: Path) -> None:
        content = DAMAGES[kind]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)

    return damage


# --- trying ------------------------------------------------------------------------------------------------------


def attempt(case: Case, world: Path) -> str | None:
    """What is wrong with how a case ends; None where it is refused as it should be."""
    with _damaged(case, world):
        before = hashes(world)
        code, said, fault = run([part.replace("@", str(world)) for part in shlex.split(case.command)])
        after = hashes(world)
    shutil.rmtree(world / "out", ignore_errors=True)
    lines = [line for line in said.splitlines() if line.strip()]
    if fault is not None:
        return f"{type(fault).__name__}: {str(fault)[:200]}"
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if code == 0 and case.may_pass:
        inside = [name for name in changed if not name.startswith("out")]
        return f"writes {', '.join(sorted(inside)[:3])}" if inside else None
    if code != 2:
        return f"exit code {code}"
    if sum(line.startswith("error: ") for line in lines) != 1 or not lines[-1].startswith("error: "):
        return f"not one line: {said[-300:]}"
    return f"writes {', '.join(sorted(changed)[:3])}" if changed else None


@contextmanager
def _damaged(case: Case, world: Path) -> Iterator[None]:
    """The world as a case wants it."""
    if case.damage is None or case.damaged is None:
        yield
        return
    path = world / case.damaged
    content = path.read_bytes() if path.exists() else None
    case.damage(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)


def hashes(folder: Path) -> dict[str, str]:
    """The checksum of every file, by its path; folders have none."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): sha256(path) if path.is_file() else "" for path in paths}


def main(
    output: Annotated[Path | None, typer.Option(help="A JSON file for the result.")] = None,
    only: Annotated[str, typer.Option(help="Cases whose group or name holds this text.")] = "",
) -> None:
    """Try all cases; tell those that are not refused as they should be, and end with 1 if there are any."""
    tried: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        make_world(world)
        for case in cases(world):
            if only in f"{case.group}: {case.name}":
                tried[case.group] += 1
                if found := attempt(case, world):
                    wrong[f"{case.group}: {case.name}"] = found.replace(str(world), "WORLD")
                    typer.echo(f"{case.group}: {case.name}: {found}")
    typer.echo(
        f"{tried.total()} bad inputs, {tried.total() - len(wrong)} refused in one line, nothing written"
    )
    if output is not None:
        write_json(
            output,
            {
                "tried": dict(tried),
                "total": tried.total(),
                "wrong": wrong,
                "environment": describe_environment(),
            },
        )
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
