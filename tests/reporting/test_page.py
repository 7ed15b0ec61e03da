"""The page: whole, offline, escaped, and honest about what is missing."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shd_diffusion.cli import main
from shd_diffusion.errors import UserError
from shd_diffusion.reporting import write_report
from shd_diffusion.reporting.page import lead, title
from shd_diffusion.reporting.runs import read_runs

from .made_up_runs import BLOCKS
from .made_up_text_runs import HOSTILE, make_text_run


class Elements(HTMLParser):
    """Every start tag with its attributes, and whether tags close in order."""

    VOID = frozenset({"meta", "img", "input", "br", "hr", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def text_of(page: str) -> str:
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def without(run: Path, *parts: str) -> Path:
    """A run without what a test does not look at, and what takes its time to draw."""
    for part in parts:
        (run / part).unlink()
    return run


def test_the_page_is_whole_and_needs_nothing_else(report: Path) -> None:
    page = report.read_text()
    elements = Elements(page)
    assert elements.open == []
    tags = [tag for tag, _ in elements.found]
    assert "script" not in tags and "link" not in tags
    for tag, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
        assert tag != "img" or attributes.get("alt")
    assert not re.search(r"@import|url\((?!#)", page)
    identifiers = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    anchors = {str(a["href"])[1:] for tag, a in elements.found if tag == "a"}
    assert anchors and anchors <= set(identifiers)
    assert len(page) < 2_000_000


def test_the_page_says_what_came_out(report: Path) -> None:
    text = text_of(report.read_text())
    for part in (
        "3 students: 12 heads squeezed into 5",
        "kd-shd has the lowest FID (digits-classifier) of the students, 104.30; kd has 389.70, none has 440.10, "
        "the teacher has 38.20. kd-shd has 0.21 times the parameters, 0.25 times the multiply-adds an image, "
        "0.25 times the time an image, 0.25 times the memory of the teacher, and was trained in 60 s.",
        "no image was picked by hand. Each begins from the same noise in every run.",
        "label 3, noised to timestep 250",
        "The best student's value is underlined.",
        "the images of the reference (digits) that are nearest",
        "kd-shd median of the nearest 1.50 #0 label 0 #1 – #2 – #5 label 1 #8 0.75 #9 1.25",
        "shd-diffusion distill configs/digits/kd-shd.yaml",
        "losses.shd.weight – 0.0 0.0 5.0",
        "ab12" * 16,
    ):
        assert part in text, part
    assert "make them with" not in text


def test_the_page_of_text_runs_shows_prompts_words_and_the_teacher(text_report: Path) -> None:
    page = text_report.read_text()
    elements = Elements(page)
    assert elements.open == []
    text = text_of(page)
    for part in (
        "kd-shd has the lowest CMMD of the students, 0.500; kd has 0.700, the teacher has 0.400.",
        "teacher 12 heads, CMMD 0.400 kd 5 heads, CMMD 0.700",
        "a red disc a green disc a blue disc",
        "Of each prompt the first image; 6 other prompts are left out, evenly, and no image was picked by hand. "
        "Each begins from the same noise in every run.",
        "CMMD ↓ CLIP score ↑ R-precision ↑",
        "kd-shd 400 k (0.44x) 5 0.500 30.23 70.0% [70.0%, 90.0%] 800 ms",
        "kd-shd 0.0500 [0.0450, 0.0550] 10.0% [9.0%, 11.0%] 0.900 [0.810, 0.990]",
        "kd: LPIPS is left out: its weights are not here",
        "a red disc on <b>& אדום 🐈 What the teacher attends to on this image (noised to timestep 250), what",
        "each word of the prompt: mean over the heads",
        "Block 2, b.attn. the image <|startoftext|> teacher, ",
    ):
        assert part in text, part
    images = [attributes for tag, attributes in elements.found if tag == "img"]
    assert sum("a blue disc" in str(image.get("alt")) for image in images) == 2  # one is missing


def test_prompts_are_text_whatever_is_in_them(tmp_path: Path) -> None:
    run = make_text_run(tmp_path / "teacher", 0.0, HOSTILE, len(HOSTILE))
    page = write_report([run], tmp_path / "report.html").read_text()
    elements = Elements(page)
    assert elements.open == []
    assert not {"script", "b"} & {tag for tag, _ in elements.found}
    assert "\x07" not in page
    titles = [
        str(attributes["title"]) for _, attributes in elements.found if attributes.get("class") == "title"
    ]
    assert [title.replace(r"\x07", "\x07") for title in titles] == HOSTILE


def test_every_figure_is_beside_it_as_png(report: Path) -> None:
    figures = sorted((report.parent / "report-figures").iterdir())
    assert {
        "samples.png",
        "nearest.png",
        "divergence-kd-shd.png",
        "loss-shd.png",
        "fid-over-parameters.png",
        "attention-alpha.png",
        "attention-divergence.png",
    } <= {figure.name for figure in figures}
    assert len([figure for figure in figures if "maps" in figure.name]) == BLOCKS
    for figure in figures:
        with Image.open(figure) as image:
            assert image.format == "PNG" and len(image.convert("L").getcolors(1 << 20) or []) > 2, figure.name


def test_the_same_runs_give_the_same_page_and_old_figures_go(runs: dict[str, Path], tmp_path: Path) -> None:
    page, earlier = tmp_path / "one.html", PngInfo()
    earlier.add_text("Software", "Matplotlib version3.10.0, https://matplotlib.org/")
    folder = tmp_path / "one-figures"
    folder.mkdir()
    page.write_text('<html><meta name="generator" content="shd-diffusion">an earlier report')
    Image.new("RGB", (4, 4)).save(folder / "loss-gone.png", pnginfo=earlier)
    first = write_report([runs["teacher"]], page).read_text()
    assert first == write_report([runs["teacher"]], page).read_text()
    assert not (folder / "loss-gone.png").exists() and (folder / "loss-denoise.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one-figures", "one.html"]


def test_what_a_run_lacks_is_named_with_its_command(fresh_run: Callable[[str], Path], tmp_path: Path) -> None:
    run = fresh_run("kd-shd")
    for part in ("samples", "evaluation"):
        shutil.rmtree(run / part)
    for part in ("metrics.jsonl", "environment.json", "attention.safetensors"):
        (run / part).unlink()
    text = text_of(write_report([run], tmp_path / "report.html").read_text())
    assert "1 student: 12 heads squeezed into 5 Not evaluated yet." in text
    assert f"Runs without samples; make them with: shd-diffusion sample {run}" in text
    assert "neighbours" not in text  # the evaluation finds them too
    assert f"Runs without metrics; compute them with: shd-diffusion evaluate {run}" in text
    assert text.count(f"shd-diffusion distill {run}/config.yaml") == 3  # metrics log, attention, commands


def test_neighbours_that_are_not_there_are_accounted_for(
    fresh_run: Callable[[str], Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    old, blind = (
        without(fresh_run(name), "attention.safetensors", "metrics.jsonl") for name in ("kd", "none")
    )
    (old / "evaluation" / "nearest.json").unlink()
    note = {"reference": "imagenet.npz", "num_reference_images": None, "note": "it has no images"}
    (blind / "evaluation" / "nearest.json").write_text(json.dumps(note))
    text = text_of(write_report([old, blind], tmp_path / "report.html").read_text())
    assert "none: not looked for, as it has no images (imagenet.npz)." in text
    assert f"Runs whose neighbours are not known; find them with: shd-diffusion evaluate {old}" in text
    assert "Drawn or remembered" not in text


def test_names_and_values_from_files_are_escaped(fresh_run: Callable[..., Path], tmp_path: Path) -> None:
    run = fresh_run("<b>&'\"", blocks=1)
    metrics = run / "evaluation" / "metrics.json"
    content = json.loads(metrics.read_text())
    content["warnings"] = ["<script>alert(1)</script>"]
    content["protocol"]["reference"] = "</td><img src=x onerror=alert(1)>"
    metrics.write_text(json.dumps(content))
    elements = Elements(write_report([run], tmp_path / "report.html").read_text())
    assert elements.open == []
    assert not {"script", "b"} & {tag for tag, _ in elements.found}
    assert all("onerror" not in attributes for _, attributes in elements.found)


def test_bad_input_writes_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/config\.yaml: missing"):
        write_report([runs["kd"], tmp_path / "empty"], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "is_titled", "leads"),
    [
        (["teacher"], "Teacher teacher", "By FID (digits-classifier) the teacher has 38.20."),
        (
            ["kd"],
            "1 student: 12 heads squeezed into 5",
            "kd has FID (digits-classifier), 389.70. kd was trained in 60 s.",
        ),
    ],
)
def test_headline_of_one_run(runs: dict[str, Path], names: list[str], is_titled: str, leads: str) -> None:
    found = read_runs([runs[name] for name in names])
    assert (title(found), lead(found)) == (is_titled, leads)


def test_no_headline_where_protocols_differ(runs: dict[str, Path], fresh_run: Callable[[str], Path]) -> None:
    other = fresh_run("none")
    metrics = other / "evaluation" / "metrics.json"
    content = json.loads(metrics.read_text())
    content["protocol"]["num_images"] = 10
    metrics.write_text(json.dumps(content))
    assert lead(read_runs([runs["kd"], other])) == (
        "These metrics do not compare: the protocols differ in num_images."
    )


def test_figures_of_somebody_else_are_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "paper-figures").mkdir()
    (tmp_path / "paper-figures" / "plot.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"paper-figures: would be replaced, but is of no paper\.html"):
        write_report([runs["kd"]], tmp_path / "paper.html")
    assert (tmp_path / "paper-figures" / "plot.png").read_bytes() == b"mine"
    assert not (tmp_path / "paper.html").exists()


def test_a_page_of_somebody_else_is_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "my-figures").mkdir()
    (tmp_path / "my-figures" / "photo.png").write_bytes(b"mine")
    for content in (b"<html>about me</html>", b"\xff\xfe", b""):
        (tmp_path / "my.html").write_bytes(content)
        with pytest.raises(UserError, match=r"my\.html: would be replaced, but is no page of shd-diffusion"):
            write_report([runs["kd"]], tmp_path / "my.html")
        assert (tmp_path / "my.html").read_bytes() == content
    assert (tmp_path / "my-figures" / "photo.png").read_bytes() == b"mine"


@pytest.mark.parametrize("key", ["data.path", "prepare.vae", "teacher.path", "evaluate.reference"])
def test_no_page_is_written_among_what_a_run_reads(
    key: str, fresh_run: Callable[..., Path], tmp_path: Path
) -> None:
    run, read = fresh_run("kd"), tmp_path / "read"
    (read / "class").mkdir(parents=True)
    section, name = key.split(".")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.setdefault(section, {})[name] = str(read)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for page in (read / "report.html", read / "class" / "page.html"):
        with pytest.raises(UserError, match=rf"{page}: lies in {read}, which is read \(`{key}`\)"):
            write_report([run], page)
    assert [path.name for path in read.rglob("*")] == ["class"]


def test_what_else_lies_among_the_plots_is_left_alone(fresh_run: Callable[..., Path], tmp_path: Path) -> None:
    run = without(fresh_run("kd"), "attention.safetensors")
    write_report([run], tmp_path / "my.html")
    (tmp_path / ".my.html.tmp-1").touch()  # of a call that was killed
    photo = tmp_path / "my-figures" / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    with pytest.raises(UserError, match=r"photo\.png: would be deleted with earlier plots"):
        write_report([run], tmp_path / "my.html")
    assert photo.exists()
    photo.unlink()
    write_report([run], tmp_path / "my.html")
    assert not (tmp_path / ".my.html.tmp-1").exists()


def test_a_place_that_cannot_be_written_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report([runs["teacher"]], tmp_path / "file" / "report.html")


def test_names_of_runs_are_names(fresh_run: Callable[..., Path], tmp_path: Path) -> None:
    """No formula, no colour, no reference, no escape sequence: what the page shows is what the folder is called."""
    names = [r"$\undefined{$ #1f63d6 url(#a)", "_child", "a\x1b[31mb" + os.fsdecode(b"\xe9"), '"><b>']
    page = write_report([fresh_run(name, blocks=1) for name in names], tmp_path / "report.html").read_text()
    assert Elements(page).open == []
    for name in [*names[:2], r"a\x1b[31mb\udce9", names[3]]:
        assert page.count(f">{html.escape(name, quote=False)}</text>") >= 4, name  # legends and titles
    assert "\x1b" not in page


def test_the_users_settings_of_matplotlib_do_not_matter(
    fresh_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run("kd", blocks=1)
    usual = write_report([run], tmp_path / "report.html").read_text()
    settings = {
        "lines.linewidth": 9,
        "axes.grid": False,
        "savefig.dpi": 20,
        "font.size": 30,
        "backend": "svg",
    }
    for name, value in settings.items():
        monkeypatch.setitem(mpl.rcParams, name, value)
    assert write_report([run], tmp_path / "report.html").read_text() == usual


def test_a_page_tells_when_a_run_went_on(fresh_run: Callable[..., Path], tmp_path: Path) -> None:
    run = fresh_run("kd", blocks=1)
    first = json.loads((run / "environment.json").read_text())
    sessions = [{**first, "started": f"2026-02-0{day}T00:00:00+00:00"} for day in (1, 2)]
    (run / "environment.json").write_text(json.dumps({**first, "resumed": sessions}))
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "2026-02-01" in page and "2026-02-02" in page and page.count("resumed") == 1


def test_a_terminal_that_knows_ascii_alone_gets_no_escape_sequences(
    fresh_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the backend of Matplotlib is to be, which is imported in a fresh interpreter."""
    run = without(fresh_run("é\x1b[31m"), "attention.safetensors", "metrics.jsonl")
    command = [sys.executable, "-m", "shd_diffusion.cli", "report", run]
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "none of these"}
    done = subprocess.run(command, env=ascii_alone, capture_output=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and b"Traceback" not in said
    assert b"\x1b" not in said and rb"\x1b[31m" in said

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["shd-diffusion", "report", str(run / "gone")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = b"".join(stream.buffer.getvalue() for stream in streams)
    assert b"\x1b" not in said and rb"\x1b[31m" in said
