"""Samples side by side: which images are shown of which run, and what they are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.pictures import Pixels
from shd_diffusion.reporting.runs import read_runs
from shd_diffusion.reporting.samples import sample_galleries

from .made_up_text_runs import PROMPTS, make_text_run


def told(run: Path, **changes: Any) -> None:
    """Change a run's sampling.json."""
    path = run / "samples" / "sampling.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def png(run: Path, index: int) -> Pixels:
    with Image.open(run / "samples" / f"{index:06d}.png") as image:
        return np.asarray(image.convert("RGB"))


def enlarged(image: Pixels, factor: int) -> Pixels:
    return image.repeat(factor, 0).repeat(factor, 1)


def test_the_gallery_shows_the_same_indices_of_every_run(runs: dict[str, Path]) -> None:
    (gallery,) = sample_galleries(read_runs(list(runs.values())))
    assert gallery.kind == "labels" and gallery.same_noise and gallery.left_out == 0
    assert [row.title for row in gallery.rows] == [str(label) for label in range(10)]
    for run, picture in zip(gallery.runs, gallery.rows[7].pictures, strict=True):
        assert picture is not None and picture.shape == (48, 4 * 48 + 3 * 3, 4)
        left = 3 * (48 + 3)  # the fourth image of label 7
        np.testing.assert_array_equal(picture[:, left:, :3], enlarged(png(run.path, 37), 6))


def test_labels_stand_in_the_order_of_their_numbers(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    told(run, labels=[(index % 12) for index in range(40)][::-1])
    (gallery,) = sample_galleries(read_runs([run]))
    titles = [int(row.title) for row in gallery.rows]
    assert titles == sorted(titles) and (titles[0], titles[-1], gallery.left_out) == (0, 11, 2)


def test_samples_of_other_seeds_are_not_called_the_same_noise(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("kd-shd")
    told(other, protocol={"seed": 1})
    (gallery,) = sample_galleries(read_runs([runs["kd"], other]))
    assert not gallery.same_noise


def test_a_row_shows_its_own_label_in_runs_that_were_dealt_others(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("kd-shd")
    told(other, labels=[(index + 1) % 10 for index in range(40)])
    (gallery,) = sample_galleries(read_runs([runs["kd"], other]))
    assert not gallery.same_noise
    picture = gallery.rows[1].pictures[1]
    assert picture is not None  # label 1 is image 0, 10, 20, 30 there
    np.testing.assert_array_equal(picture[:, :48, :3], enlarged(png(other, 0), 6))


def test_large_samples_are_reduced_and_broken_ones_named(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    for index in range(40):
        Image.new("RGB", (256, 512), (0, 0, index)).save(run / "samples" / f"{index:06d}.png")
    (gallery,) = sample_galleries(read_runs([run]))
    picture = gallery.rows[0].pictures[0]
    assert picture is not None and picture.shape[:2] == (128, 4 * 64 + 3 * 8)
    (run / "samples" / "000000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000000\.png: cannot be read; run `shd-diffusion sample .*` again"):
        sample_galleries(read_runs([run]))


def test_images_that_are_missing_leave_gaps(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    (run / "samples" / "000010.png").unlink()
    for index in range(1, 40, 10):
        (run / "samples" / f"{index:06d}.png").unlink()
    told(run, labels=[*range(9), *[0] * 31])
    (gallery,) = sample_galleries(read_runs([run]))
    first, second = (row.pictures[0] for row in gallery.rows[:2])
    assert second is None and gallery.rows[1].uris() == [None]
    assert first is not None and first.shape == (48, 4 * 48 + 3 * 3, 4)
    alpha = first[0, ::51, 3]  # images 0, 9, 10 and 11, of which 10 and 11 are gone
    assert alpha.tolist() == [255, 255, 0, 0]


def test_a_row_a_prompt_with_the_first_image_of_each_run(tmp_path: Path) -> None:
    """Twice round fourteen prompts; teachers come first whatever the order they are given in."""
    runs = [make_text_run(tmp_path / name, noise) for name, noise in (("kd", 0.3), ("teacher", 0.0))]
    (gallery,) = sample_galleries(read_runs(runs))
    assert (gallery.kind, gallery.same_noise, gallery.left_out) == ("prompts", True, len(PROMPTS) - 8)
    assert [run.name for run in gallery.runs] == ["teacher", "kd"]
    indices = [PROMPTS.index(row.title) for row in gallery.rows]
    assert indices == [0, 2, 4, 6, 7, 9, 11, 13]  # of 0 to 13, evenly
    for index, row in zip(indices, gallery.rows, strict=True):
        for run, picture in zip(reversed(runs), row.pictures, strict=True):
            assert picture is not None
            np.testing.assert_array_equal(picture[..., :3], enlarged(png(run, index), 3))


def test_several_images_a_prompt_are_shown_by_their_first(tmp_path: Path) -> None:
    run = make_text_run(tmp_path / "kd", 0.1, ["a red disc", "a red disc", "a blue disc", "a blue disc"], 4)
    (gallery,) = sample_galleries(read_runs([run]))
    assert [row.title for row in gallery.rows] == ["a red disc", "a blue disc"]
    picture = gallery.rows[1].pictures[0]
    assert picture is not None
    np.testing.assert_array_equal(picture[..., :3], enlarged(png(run, 2), 3))


def test_prompts_of_all_runs_are_preferred_and_others_leave_gaps(tmp_path: Path) -> None:
    one = make_text_run(tmp_path / "one", 0.1, ["a red disc", "a blue disc"], 2)
    two = make_text_run(tmp_path / "two", 0.1, ["a green disc", "a blue disc"], 2)
    three = make_text_run(tmp_path / "three", 0.1, ["a green square"], 1)
    (shared,) = sample_galleries(read_runs([one, two]))
    assert [row.title for row in shared.rows] == ["a blue disc"] and not shared.same_noise
    (apart,) = sample_galleries(read_runs([one, three]))
    assert [row.title for row in apart.rows] == ["a red disc", "a blue disc"]
    assert all(row.pictures[0] is not None and row.pictures[1] is None for row in apart.rows)


def test_unconditional_runs_show_their_first_images(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    told(run, labels=None)
    (gallery,) = sample_galleries(read_runs([run]))
    assert gallery.kind == "neither" and [row.title for row in gallery.rows] == [""] * 6
    picture = gallery.rows[5].pictures[0]
    assert picture is not None
    np.testing.assert_array_equal(picture[:, -48:, :3], enlarged(png(run, 23), 6))


def test_runs_by_label_and_by_prompt_have_galleries_of_their_own(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    text = make_text_run(tmp_path / "text", 0.1)
    galleries = sample_galleries(read_runs([runs["kd"], text, runs["none"]]))
    assert [(g.kind, [run.name for run in g.runs]) for g in galleries] == [
        ("labels", ["kd", "none"]), ("prompts", ["text"])
    ]  # fmt: skip
    assert [gallery.plot().name for gallery in galleries] == ["samples", "samples-prompts"]


def test_runs_that_have_no_finished_images_have_no_gallery(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    told(run, num_images=0, labels=[])
    assert sample_galleries(read_runs([run])) == []
