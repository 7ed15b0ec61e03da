"""What figures are drawn from, and that they follow the colours of the page."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from shd_diffusion.reporting.attention import attention_views, membership
from shd_diffusion.reporting.maps import map_pixels
from shd_diffusion.reporting.neighbour_page import neighbour_plots, neighbourhoods, short_name
from shd_diffusion.reporting.page import run_styles
from shd_diffusion.reporting.pictures import data_uri, mosaic
from shd_diffusion.reporting.plot_style import DARK, DEPTH_COLOURS, LIGHT, logarithmic_ticks, panel, smooth
from shd_diffusion.reporting.quality_plots import quality_scatters
from shd_diffusion.reporting.runs import read_runs
from shd_diffusion.reporting.training_plots import (
    depth_shades,
    loss_curves,
    loss_shares,
    shd_by_block,
    validation_fid,
)

from .colours import contrast
from .made_up_runs import GROUPS


def test_smooth_is_the_mean_of_present_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=23)
    values[[0, 4, 5, 6, 7, 8, 22]] = np.nan
    for window in (1, 3, 5):
        half = window // 2
        parts = [values[max(0, i - half) : i + half + 1] for i in range(23)]
        expected = [np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts]
        np.testing.assert_allclose(smooth(values, window), expected)
    assert len(smooth(values[:2], 5)) == 2


def test_mosaic_sets_images_apart_by_transparent_gaps() -> None:
    images = [[np.full((2, 3, 3), 10 * row + column, np.uint8) for column in range(2)] for row in range(3)]
    picture = mosaic(images, gap=1)
    assert picture.shape == (8, 7, 4)
    assert (picture[3:5, 4:7, :3] == 11).all() and (picture[3:5, 4:7, 3] == 255).all()
    assert not picture[2].any() and not picture[:, 3].any()


def test_samples_stand_beside_their_neighbours(runs: dict[str, Path]) -> None:
    (run,) = read_runs([runs["kd"]])
    (near,) = neighbourhoods([run])
    assert len(near.rows) == 8 and near.middle == 1.5  # of 3/4, 4/4, ... 9/4
    for number, row in enumerate(near.rows):
        for column, each in enumerate(row):
            with Image.open(
                io.BytesIO(base64.b64decode(each.uri.removeprefix("data:image/png;base64,")))
            ) as image:
                colours = image.convert("RGB").getcolors()
            assert colours == [(48 * 36, (20 * number, 100 * column, 50))]
        assert (row[0].name, row[0].caption, row[0].detail) == (
            f"sample {5 * number}", f"#{5 * number}", f"label {number}"
        )  # fmt: skip
        relative = f"{(number + 4) / 4:.2f}" if number else "–"
        assert (row[2].name, row[2].caption, row[2].detail) == (
            f"digits: image {7 * number + 2}", f"#{7 * number + 2}", relative
        )  # fmt: skip
    (plot,) = neighbour_plots([near, near])
    assert plot.name == "nearest" and "kd, kd" in plot.description
    assert neighbour_plots([]) == []


def test_neighbours_are_called_by_number_or_file() -> None:
    assert short_name("digits: image 12") == "#12"
    assert short_name("train/n01440764/n01440764_10026.JPEG") == "n01440764_10026.JPEG"


def test_each_squeezed_head_stands_under_the_heads_it_is_made_of(runs: dict[str, Path]) -> None:
    tensors = load_file(runs["kd"] / "attention.safetensors")
    weights = tensors["transformer_blocks.0.attn1/weights"]
    assert [tuple(heads) for heads in membership(weights)] == GROUPS
    students = read_runs([runs["none"], runs["kd"], runs["kd-shd"]])
    (view,) = attention_views(students, run_styles(students))  # same teacher, same maps: one view
    assert [run.name for run in view.runs] == ["none", "kd", "kd-shd"]
    group = view.blocks[0].groups[0]
    assert [head.number for head in group.teacher] == [1, 2, 3, 4]
    assert [head.detail for head in group.teacher] == [f"{w:.2f}" for w in weights.mean(0)[0, :4]]
    divergence = tensors["transformer_blocks.0.attn1/divergence"][:, 0].mean()
    assert group.students[1][1].detail == f"{divergence:#.2g}"


def test_students_of_other_maps_have_views_of_their_own(runs: dict[str, Path]) -> None:
    one, other = read_runs([runs["kd"], runs["kd-shd"]])
    assert other.attention
    other.attention.blocks[0].squeezed[:] = other.attention.blocks[0].squeezed[::-1].copy()
    views = attention_views([one, other], run_styles([one, other]))
    assert [[run.name for run in view.runs] for view in views] == [["kd"], ["kd-shd"]]


def test_maps_keep_their_pixels_in_the_page() -> None:
    image = map_pixels(np.random.default_rng(0).random((40, 30)), brightest=0.9)
    encoded = data_uri(image).removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), image)


def test_map_pixels_darken_with_attention() -> None:
    row = map_pixels(np.linspace(0, 2, 9)[None], brightest=1.0)[0].astype(int).sum(axis=-1)
    assert row[0] == 3 * 255 and (np.diff(row)[:4] < 0).all() and (row[4:] == row[4]).all()


def test_figures_take_the_colours_of_the_page(runs: dict[str, Path]) -> None:
    everything = read_runs(list(runs.values()))
    styles = run_styles(everything)
    plots = [*loss_curves(everything, styles), *loss_shares(everything), *validation_fid(everything, styles)]
    plots += [*shd_by_block(everything), *quality_scatters(everything, styles)]
    names = [plot.name for plot in plots]
    assert names == ["loss-denoise", "loss-output", "loss-shd", "shares-kd", "shares-kd-shd", "fid-validation",
                     "divergence-kd-shd", "fid-over-parameters", "fid-over-multiply-adds-an-image",
                     "fid-over-time-an-image"]  # fmt: skip
    identifiers: list[str] = []
    for plot in plots:
        colours = set(
            re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})\b", plot.svg)
        )  # as the style sheet wants it
        assert LIGHT["muted"] in colours and colours <= set(LIGHT.values()), plot.name
        assert set(re.findall(r"#[0-9a-f]{6}\b", plot.svg)) == colours and "<metadata" not in plot.svg
        own = re.findall(r'\bid="([^"]+)"', plot.svg)
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', plot.svg)) <= {(i, "") for i in own} | {
            ("", i) for i in own
        }
        identifiers += own
        assert Image.open(io.BytesIO(plot.png)).width > 600
    assert len(identifiers) == len(set(identifiers))
    assert "kd-shd 104.30 at 261 k" in plots[-3].description


def test_a_term_is_drawn_for_the_runs_that_have_it(runs: dict[str, Path]) -> None:
    everything = read_runs(list(runs.values()))
    curves = loss_curves(everything, run_styles(everything))
    assert curves[0].description.endswith("teacher, none, kd, kd-shd")
    assert curves[2].description.endswith(": kd-shd")


def test_the_validation_of_a_term_is_drawn_with_it(fresh_run: Callable[[str], Path]) -> None:
    folder = fresh_run("kd")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in log:
        if entry["step"] % 150 == 0:
            entry["validation"] = {"loss": 0.5, "terms": {"denoise": 0.4}}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    everything = read_runs([folder])
    denoise, output = loss_curves(everything, run_styles(everything))
    assert ">kd, validation<" in denoise.svg and "validation" not in output.svg
    assert validation_fid(everything, run_styles(everything)) == []


def test_the_divergence_is_a_curve_a_block_in_the_colours_of_depth(
    fresh_run: Callable[[str], Path], tmp_path: Path
) -> None:
    assert depth_shades(1) == [0] and depth_shades(3) == [0, 3, 6] and depth_shades(7) == list(range(7))
    many = depth_shades(28)
    assert many == sorted(many) and [many.count(shade) for shade in range(7)] == [4] * 7
    deep = fresh_run("kd-shd")
    log = [json.loads(line) for line in (deep / "metrics.jsonl").read_text().splitlines()]
    for entry in log[1::2]:  # the term counts at every other logged step
        del entry["shd_by_block"]
    for entry in log[::2]:
        entry["shd_by_block"] = {f"blocks.{i}": (1 + i) / entry["step"] for i in range(28)}
    (deep / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    (plot,) = shd_by_block(read_runs([deep]))
    for colour in DEPTH_COLOURS:
        assert f"stroke: {LIGHT[colour]}" in plot.svg
    for label in ("block 0-3", "4-7", "24-27"):
        assert f">{label}<" in plot.svg
    assert shd_by_block(read_runs([fresh_run("kd")])) == []


def test_both_palettes_have_the_same_colours_and_depth_stands_out_from_the_paper() -> None:
    assert LIGHT.keys() == DARK.keys()
    for palette in (LIGHT, DARK):
        contrasts = [contrast(palette[name], palette["paper"]) for name in DEPTH_COLOURS]
        assert min(contrasts) > 2.9 and contrasts == sorted(contrasts)


def test_figures_do_without_numbers_that_are_not_there(fresh_run: Callable[[str], Path]) -> None:
    folder = fresh_run("kd")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "terms": {"denoise": {"value": 0.5, "share": 1.0}, "shd": {"value": NaN, "share": NaN}}}\n'
        '{"step": 2, "terms": {"denoise": {"value": 0.0, "share": 1.0}}}\n'
    )
    (folder / "evaluation" / "metrics.json").write_text('{"fid": NaN, "precision": Infinity, "protocol": {}}')
    runs = read_runs([folder])
    styles = run_styles(runs)
    assert [plot.name for plot in loss_curves(runs, styles)] == ["loss-denoise"]
    assert (quality_scatters(runs, styles), validation_fid(runs, styles)) == ([], [])


def test_a_curve_that_is_all_but_constant_has_room() -> None:
    with panel() as (_, axes), np.errstate(all="raise"):
        axes.plot([1, 2], [2.0, np.nextafter(2.0, 3)])
        axes.set_yscale("log")
        logarithmic_ticks(axes.yaxis)
        low, high = axes.get_ylim()
    assert low < 1.9 < 2.1 < high
