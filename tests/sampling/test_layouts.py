"""Samples in the layouts of GenEval and DPG-Bench, read as the benchmarks' own scorers read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.files import write_json
from shd_diffusion.sample_folder import image_path
from shd_diffusion.sampling.layouts import write_layout
from shd_diffusion.sampling.prompts import Prompt, read_prompts

SIDE = 6


def _samples(folder: Path, prompts: list[Prompt], per_prompt: int, height: int = SIDE) -> Path:
    """A folder of samples, each image of one grey level: its index."""
    folder.mkdir()
    texts = [prompt.text for prompt in prompts for _ in range(per_prompt)]
    for index in range(len(texts)):
        Image.new("RGB", (SIDE, height), (index,) * 3).save(image_path(folder, index))
    write_json(folder / "sampling.json", {"num_images": len(texts), "prompts": texts})
    return folder


def _level(image: Image.Image) -> int:
    (level,) = np.unique(np.asarray(image))
    return int(level)


def test_geneval_finds_every_image_with_its_metadata(tmp_path: Path) -> None:
    """The loop of evaluate_images.py in djghosh13/geneval: subfolders by digits, images by digits and .png."""
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "color_attr", "include": [], "exclude": [], "prompt": "ein grüner Apfel"},
    ]
    source = tmp_path / "evaluation_metadata.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(source)
    to = write_layout("geneval", _samples(tmp_path / "samples", prompts, 3), prompts)

    found = {}
    for subfolder in to.iterdir():
        assert subfolder.name.isdigit() and len(subfolder.name) == 5
        metadata = json.loads((subfolder / "metadata.jsonl").read_text())
        for path in (subfolder / "samples").iterdir():
            assert re.match(r"\d+\.png", path.name)
            with Image.open(path) as image:
                found[_level(image)] = metadata
    assert found == {index: lines[index // 3] for index in range(6)}
    names = sorted(path.name for path in (to / "00001" / "samples").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]


def test_dpg_bench_cuts_the_four_images_out_of_each_grid(tmp_path: Path) -> None:
    """The crops of compute_dpg_bench.py in TencentQQGYLab/ELLA, whose key is the file's name up to a dot."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("whoops7", "a"), ("0", "b")):
        (folder / f"{name}.txt").write_text(text)
    prompts = read_prompts(folder)
    to = write_layout("dpg_bench", _samples(tmp_path / "samples", prompts, 4), prompts)
    found = {}
    for path in to.iterdir():
        with Image.open(path) as image:
            assert image.size == (2 * SIDE, 2 * SIDE)
            corners = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
            found[path.name.split(".")[0]] = [
                _level(image.crop((x, y, x + SIDE, y + SIDE))) for x, y in corners
            ]
    assert found == {"0": [0, 1, 2, 3], "whoops7": [4, 5, 6, 7]}


PLAIN = [Prompt("a", "00000"), Prompt("b", "00001")]
TAGGED = [Prompt(prompt.text, prompt.id, {"tag": "colors"}) for prompt in PLAIN]


@pytest.mark.parametrize(
    ("layout", "prompts", "sampled", "per_prompt", "says"),
    [
        ("geneval", PLAIN, PLAIN, 2, "prompt 00000 has no key `tag`, which GenEval's scorer needs"),
        ("geneval", TAGGED, TAGGED[::-1], 2, "its 4 images are not equally many of each of these 2 prompts"),
        ("geneval", TAGGED, TAGGED[:1], 1, "its 1 images are not equally many"),
        ("geneval", TAGGED[:1], TAGGED, 1, "its 2 images are not equally many"),
        ("dpg_bench", PLAIN, PLAIN, 2, "DPG-Bench takes 4 images of each prompt, not 2; set"),
        ("dpg_bench", [Prompt("a", "a.b")], PLAIN[:1], 4, "the name a.b has a dot"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    layout: str, prompts: list[Prompt], sampled: list[Prompt], per_prompt: int, says: str, tmp_path: Path
) -> None:
    folder = _samples(tmp_path / "samples", sampled, per_prompt)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        write_layout(layout, folder, prompts)
    assert "\n" not in str(refused.value) and sorted(folder.iterdir()) == before


def test_images_that_are_not_square_leave_nothing(tmp_path: Path) -> None:
    folder = _samples(tmp_path / "samples", PLAIN, 4, height=SIDE + 2)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="is 6×8, but DPG-Bench takes square images"):
        write_layout("dpg_bench", folder, PLAIN)
    assert sorted(folder.iterdir()) == before
    (folder / "sampling.json").unlink()
    with pytest.raises(UserError, match="has no finished samples"):
        write_layout("dpg_bench", folder, PLAIN)


def test_what_a_scorer_has_written_there_is_kept(tmp_path: Path) -> None:
    prompts = [Prompt("a bench", "00000", {"tag": "single_object"})]
    folder = _samples(tmp_path / "samples", prompts, 2)
    to = write_layout("geneval", folder, prompts)
    write_layout("geneval", folder, prompts)  # its own are replaced
    (to / "results.jsonl").write_text("{}")
    with pytest.raises(
        UserError, match=r"geneval/results\.jsonl: is none of these images.*; move it elsewhere"
    ):
        write_layout("geneval", folder, prompts)
    assert (to / "results.jsonl").exists() and (to / "00000" / "metadata.jsonl").exists()
