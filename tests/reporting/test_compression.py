"""What the report shows of compressed models."""

from __future__ import annotations

from pathlib import Path

import pytest

from shd_diffusion.errors import UserError
from shd_diffusion.reporting import write_report
from shd_diffusion.reporting.compression import compression_plots, compression_rows
from shd_diffusion.reporting.page import run_styles
from shd_diffusion.reporting.runs import read_runs

from .made_up_runs import make_run, write

PARTS = [
    {"name": "blocks.10", "what": "block", "before": 1, "after": 0, "lost_before": 0.0, "lost": 0.25},
    {"name": "blocks.2.attn1", "what": "heads", "before": 12, "after": 6, "lost_before": 0.5, "lost": 0.125},
    {"name": "blocks.11.attn1", "what": "heads", "before": 12, "after": 4, "lost_before": 0.5, "lost": 0.375},
    {"name": "blocks.2.ff", "what": "neurons", "before": 64, "after": 16, "lost_before": 0.1, "lost": 0.0625},
]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A teacher, a compressed model with parts of all kinds, and one with fewer heads alone."""
    found = [
        make_run(tmp_path / name, fid) for name, fid in (("teacher", 9.0), ("both", 20.0), ("six", 12.0))
    ]
    for folder in found:  # what is looked at elsewhere, and takes its time to draw
        for other in ("attention.safetensors", "metrics.jsonl", "evaluation/nearest.json"):
            (folder / other).unlink(missing_ok=True)
    write(found[1] / "compression.json", {"lost": 0.5, "parts": PARTS})
    write(found[2] / "compression.json", {"lost": 0.03125, "parts": PARTS[1:2]})
    return found


def test_modules_stand_in_their_order_with_what_is_left_of_each(folders: list[Path]) -> None:
    assert compression_rows(read_runs(folders)) == [
        ("blocks.2.attn1", ["6 of 12 heads, lost 0.1250", "6 of 12 heads, lost 0.1250"]),
        ("blocks.2.ff", ["16 of 64 neurons, lost 0.0625", "–"]),
        ("blocks.10", ["left; the model's output changes by 0.2500 without it", "–"]),
        ("blocks.11.attn1", ["4 of 12 heads, lost 0.3750", "–"]),
    ]


def test_a_plot_of_heads_and_one_of_neurons(folders: list[Path]) -> None:
    runs = read_runs(folders)
    heads, neurons = compression_plots(runs, run_styles(runs))
    assert heads.description.endswith("both 10 of 24; six 6 of 12")
    assert neurons.description.endswith("both 16 of 64")
    assert compression_plots(runs[:1], run_styles(runs)) == []


def test_the_page_has_them_only_where_something_was_squeezed(folders: list[Path], tmp_path: Path) -> None:
    page = write_report(folders, tmp_path / "a.html").read_text()
    assert "both's prediction differs from the teacher's by 0.5000" in page.replace("&#39;", "'")
    assert "4 of 12 heads, lost 0.3750" in page and (tmp_path / "a-figures" / "squeezed-heads.png").exists()
    assert "Squeezed weights" not in write_report(folders[:1], tmp_path / "b.html").read_text()


def test_a_damaged_file_is_named(folders: list[Path], tmp_path: Path) -> None:
    write(folders[1] / "compression.json", {"lost": 0.5, "parts": [{"name": "a", "what": "toes"}]})
    with pytest.raises(UserError, match=r"compression\.json: key `parts\.0\.what`"):
        write_report(folders, tmp_path / "a.html")
