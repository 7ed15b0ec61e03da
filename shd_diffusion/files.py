"""Files that are whole or absent: everything is written under a temporary name and then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from shd_diffusion.errors import UserError


class Processes(Protocol):
    """What an `accelerate.Accelerator` knows of its fellow processes."""

    @property
    def is_main_process(self) -> bool: ...

    def wait_for_everyone(self) -> None: ...


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there replaces `path` at the end, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, processes: Processes | None = None) -> Iterator[Path]:
    """As `replacing_file`, for a folder with all that it holds, which is on disk before it gets its name.

    Several processes may write into one folder: each enters with its `processes` (an accelerator will do).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    leads = processes is None or processes.is_main_process
    wait = processes.wait_for_everyone if processes else lambda: None
    if leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait()
    try:
        yield temporary
        wait()
        if leads:
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            _sync(path.parent)
        wait()
    finally:
        if leads:
            shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/shd-diffusion`, or ~/.cache/shd-diffusion."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shd-diffusion"


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON with two spaces of indentation, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all.

    It may be read by whom the umask says, as any other file; safetensors itself lets its owner alone.
    """
    with replacing_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(
            f"{path}: not a JSON file; delete it and run the command that wrote it again"
        ) from None


def sha256(path: Path) -> str:
    """The checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """The checksum of plain values, hexadecimal, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def holds_files(path: Path) -> bool:
    """Whether there is anything but what a killed call has left, which has a dot before its name."""
    return path.exists() and (
        not path.is_dir() or any(not inside.name.startswith(".") for inside in path.iterdir())
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
