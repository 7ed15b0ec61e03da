"""Files that are whole or absent: everything is written under a temporary name and then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from shd_diffusion.errors import UserError, one_line, printable_path
from shd_diffusion.progress import announce

if TYPE_CHECKING:
    from torch import Tensor

Kind = TypeVar("Kind")

WRITE_AGAIN = "delete it and run the command that wrote it again"

# Temporary names: those of the functions here, and of safetensors' own writer.
TEMPORARY = re.compile(r"\..+\.tmp(-\d+)?|\.tmp\w{6}")


LOCK = ".lock"


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
        with naming(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing_file`, for a folder with all that it holds, which is on disk before it gets its name.

    All in it may be read by whom the umask says, whatever libraries have made of that.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming(path):
            yield temporary
            mode = temporary.stat().st_mode
            for inside in temporary.rglob("*"):
                inside.chmod(mode if inside.is_dir() else mode & 0o666)
                if inside.is_file():
                    _sync(inside)
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing a file name it: a full disk's come without a name, and safetensors has errors of its own."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else one_line(error), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def locked(folder: Path, processes: Processes | None = None) -> Iterator[None]:
    """No other command writes into this folder for as long as the context lasts.

    The system itself lets go of the lock of a process that has died, on network file systems too; processes that it has
    forked, such as workers that read data, do not hold it. What a killed command has left under temporary names is
    removed.

    Args:
        folder: is made where it is missing.
        processes: all enter; the main one locks.

    Raises:
        UserError: another command is at work there.
    """
    if processes is not None and not processes.is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _of_this_process((folder / LOCK).open("a")) as file:  # as it is, if it is there
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another command is at work in this folder; wait for it, or give another --output"
            ) from None
        except OSError as error:  # a file system without locks
            announce(f"{folder}: cannot be locked ({one_line(error)}); see that no other command uses it")
        for left in list(_left_behind(folder)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        yield


_HELD: set[TextIO] = set()
"""Files by which this process holds locks."""


@contextmanager
def _of_this_process(file: TextIO) -> Iterator[TextIO]:
    """A file that is open here alone: a lock lasts until all have closed it that were forked with it."""
    _HELD.add(file)
    try:
        with file:
            yield file
    finally:
        _HELD.discard(file)


def _close_held() -> None:
    while _HELD:
        _HELD.pop().close()


os.register_at_fork(after_in_child=_close_held)


def _left_behind(folder: Path) -> Iterator[Path]:
    """What lies under temporary names, but for folders in which another command is at work."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in [*folders, *files] if TEMPORARY.fullmatch(name))
        others = (name for name in folders if not TEMPORARY.fullmatch(name))
        folders[:] = [name for name in others if not _is_locked(Path(root, name))]


def _is_locked(folder: Path) -> bool:
    """Whether another command is at work in a folder."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return False


def check_ours(output: Path, *marks: str) -> None:
    """See that a folder is new, or holds what an earlier call has written there: one of these files or folders.

    Raises:
        UserError: what it holds is somebody else's.
    """
    if holds_files(output) and not any((output / mark).exists() for mark in marks):
        raise UserError(f"{printable_path(output)}: holds files but no {marks[0]}; give another --output")


def check_outside(output: Path, sources: Mapping[str, str | None]) -> None:
    """See that what is written does not come to lie among what is read, where it would be taken for a part of it.

    Args:
        output: the folder to write.
        sources: what is read, by the key that names it; what is no folder here does not count.

    Raises:
        UserError: it lies in one of these folders.
    """
    place = output.resolve()
    for key, source in sources.items():
        if source is not None and Path(source).is_dir() and place.is_relative_to(Path(source).resolve()):
            raise UserError(
                f"{printable_path(output)}: lies in {printable_path(source)}, which is read (`{key}`); "
                "give another --output"
            )


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/shd-diffusion`, or ~/.cache/shd-diffusion."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path("~/.cache").expanduser()) / "shd-diffusion"
    except RuntimeError as error:
        raise UserError(f"XDG_CACHE_HOME: {error}; set it to the folder for the cache") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may hold stray bytes


def write_json(path: Path, content: Any) -> None:
    """Write JSON with two spaces of indentation, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all.

    It may be read by whom the umask says, as any other file; safetensors itself lets its owner alone.
    """
    from safetensors.torch import save_file  # brings torch

    with replacing_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)


def read_json(path: Path, fix: str = WRITE_AGAIN) -> Any:
    """Read a JSON file; `fix` is what to do about a damaged one.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a JSON file; {fix}") from None


def read_as(path: Path, kind: type[Kind], fix: str = WRITE_AGAIN) -> Kind:
    """Read a JSON file that a stage wrote, as a type that pydantic knows; `fix` is what to do about a damaged one.

    Raises:
        UserError: it is missing or damaged, or a value in it is not what it should be.
    """
    try:
        return TypeAdapter(kind).validate_python(read_json(path, fix))
    except ValidationError as error:
        wrong = error.errors()[0]
        place = f"key `{'.'.join(map(str, wrong['loc']))}`: " if wrong["loc"] else ""
        raise UserError(f"{path}: {place}{one_line(wrong['msg'])}; {fix}") from None


def sha256(path: Path) -> str:
    """The checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """The checksum of plain values, hexadecimal, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def holds_files(path: Path) -> bool:
    """Whether there is anything but what a killed call has left: temporary names, and a lock."""
    return path.exists() and (
        not path.is_dir()
        or any(inside.name != LOCK and not TEMPORARY.fullmatch(inside.name) for inside in path.iterdir())
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
