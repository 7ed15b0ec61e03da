"""Files are whole or absent."""

import multiprocessing
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from shd_diffusion.errors import UserError, refusal
from shd_diffusion.files import (
    check_outside,
    holds_files,
    locked,
    read_as,
    read_json,
    replacing_file,
    replacing_folder,
    save_tensors,
    write_json,
)


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), replacing_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "run") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "run") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "run" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json")


# --- whose files they are ----------------------------------------------------------------------------------------


def test_two_commands_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a"),
        pytest.raises(UserError, match=r"a: another command is at work"),
        locked(tmp_path / "a"),
    ):
        pass
    with locked(tmp_path / "a"):  # the lock is gone with its owner
        pass


def test_processes_that_were_forked_do_not_hold_a_lock(tmp_path: Path):
    """Workers that read data outlive a command that was killed, by seconds."""
    context = multiprocessing.get_context("fork")
    began = context.Event()
    child = context.Process(target=_begin_and_wait, args=(began,))
    try:
        with locked(tmp_path):
            child.start()
            assert began.wait(60)
            with pytest.raises(UserError, match="at work in this folder"), locked(tmp_path):
                pass
        with locked(tmp_path):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def _begin_and_wait(began: Event) -> None:
    began.set()
    time.sleep(600)


def test_what_a_killed_command_has_left_is_removed(tmp_path: Path) -> None:
    left = [
        ".000001.png.tmp-123",
        "shards/.tmpAbC12x",
        "shards/.latents-00000.safetensors.tmp-7",
        ".pipeline.tmp/x",
    ]
    kept = ["000000.png", ".hidden", ".gitignore", "notes.tmp-1", ".tmp"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with locked(tmp_path):
        pass
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {*kept, ".lock"}


def test_what_another_command_is_writing_within_stays(tmp_path: Path) -> None:
    """As `sample RUN --checkpoint latest` does in `steps/` while the run goes on."""
    with locked(tmp_path / "steps"):
        (tmp_path / "steps" / ".step-1.tmp").mkdir()
        (tmp_path / "checkpoints" / ".step-2.tmp").mkdir(parents=True)
        with locked(tmp_path):
            pass
        assert (tmp_path / "steps" / ".step-1.tmp").exists()
        assert not (tmp_path / "checkpoints" / ".step-2.tmp").exists()
    with locked(tmp_path):
        pass
    assert not (tmp_path / "steps" / ".step-1.tmp").exists()


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        (".git", True),
        (".gitattributes", True),
        (".lock", False),
        (".pipeline.tmp", False),
        (".tmpAbC12x", False),
    ],
)
def test_what_is_hidden_is_somebodys_too(name: str, holds: bool, tmp_path: Path) -> None:
    """Such as in a repository that was just cloned; what a killed command has left is nobody's."""
    (tmp_path / name).mkdir()
    assert holds_files(tmp_path) is holds


def test_nothing_is_written_among_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    sources = {"data.path": str(tmp_path / "images"), "teacher.path": "a/hub-name", "pipeline": None}
    for inside in ("images", "images/cat/run", "link/dog", "images/../images/x"):
        with pytest.raises(UserError, match=r"lies in .*images, which is read \(`data\.path`\)"):
            check_outside(tmp_path / inside, sources)
    for outside in ("run", "images2", "images/../run"):
        check_outside(tmp_path / outside, sources)


def test_all_in_a_folder_may_be_read_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replacing_folder(tmp_path / "a") as temporary:
            (temporary / "b").mkdir(mode=0o500)
            save_file(
                {"a": torch.ones(2)}, temporary / "a.safetensors"
            )  # of the owner alone, as safetensors does it
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a" / "a.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750


# --- what the machine refuses ------------------------------------------------------------------------------------


class Numbers(BaseModel):
    steps: int


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"steps": []}', "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_not_what_a_stage_writes_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json: .*run the command that wrote it again") as caught:
        read_as(tmp_path / "a.json", Numbers)
    assert "\n" not in str(caught.value)


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a full disk; the kernel then says EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_with_the_file(tmp_path: Path) -> None:
    writers = {
        "a.json": lambda path: write_json(path, "x" * 100_000),
        "a.safetensors": lambda path: save_tensors({"a": torch.zeros(50_000)}, path),
        "folder": lambda path: _write_folder(path),
    }
    for name, write in writers.items():
        with full_disk(4096), pytest.raises(OSError) as caught:
            write(tmp_path / name)
        said = refusal(caught.value)
        assert said is not None and name in said and "make room" in said, said
    assert not list(tmp_path.iterdir())


def _write_folder(path: Path) -> None:
    with replacing_folder(path) as temporary:
        save_file({"a": torch.zeros(50_000)}, temporary / "a.safetensors")


def test_a_refusal_of_the_machine_is_no_fault_of_the_project() -> None:
    recursion, memory = RecursionError("x"), MemoryError()
    of_torch = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    assert "nested too deeply" in str(refusal(recursion))
    assert all(
        "out of memory" in str(refusal(error)) for error in (memory, of_torch, torch.OutOfMemoryError("CUDA"))
    )
    for told in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
    ):
        assert "out of memory" in str(refusal(RuntimeError(told)))
    for fault in (RuntimeError("shapes"), ValueError("x"), KeyError("x"), OSError("no number")):
        assert refusal(fault) is None
