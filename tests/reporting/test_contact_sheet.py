"""What models will see, as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from commands import TEACHER_CONFIG, command
from PIL import Image

from shd_diffusion.reporting.contact_sheet import COLUMNS, ROWS, _choose


def test_a_row_a_class_evenly_spread() -> None:
    labels = torch.arange(3).repeat(30)
    rows = _choose(90, labels, ["a", "b", "c"])
    assert [title for title, _ in rows] == ["0 a", "1 b", "2 c"]
    assert all(
        len(set(chosen)) == COLUMNS and (labels[chosen] == n).all() for n, (_, chosen) in enumerate(rows)
    )
    many = _choose(1000, torch.arange(1000) % 500, None)
    assert len(many) == ROWS and many[0] == ("0", [0, 500])
    flat = _choose(10, None, None)
    assert [chosen for _, chosen in flat] == [list(range(8)), [8, 9]]


def test_the_command(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    code, output, errors = command("show", TEACHER_CONFIG, "--output", sheet)
    assert (code, output) == (0, f"sheet: {sheet}\n") and "1,797 images, 10 classes" in errors
    assert np.asarray(Image.open(sheet).convert("L")).std() > 20
    code, _, errors = command("show", TEACHER_CONFIG, "--output", tmp_path / "sheet.txt")
    assert code == 2 and "give a .png file" in errors
    assert command("show", TEACHER_CONFIG, "--output", sheet)[0] == 0  # its own is replaced
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    code, _, errors = command("show", TEACHER_CONFIG, "--output", tmp_path / "mine.png")
    assert code == 2 and "would be replaced, but is no plot" in errors
    assert (tmp_path / "mine.png").read_bytes() == before
