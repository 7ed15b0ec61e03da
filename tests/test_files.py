"""Files are whole or absent."""

from pathlib import Path

import pytest

from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json, replacing_file, replacing_folder, write_json


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
