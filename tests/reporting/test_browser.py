"""The page in a browser: phone and desktop, light and dark, and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .colours import contrast, luminance

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium binary; apt-get install chromium to run"
)

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SCHEMES = {
    "dark": "--blink-settings=preferredColorScheme=0",
    "light": "--blink-settings=preferredColorScheme=1",
}

PROBE = """<script>addEventListener('load', () => {
  const wide = innerWidth, inside = '.scroll, pre, .picture';
  const over = [...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > wide + 0.5 && !e.parentElement.closest(inside) && !e.closest('svg'));
  const style = getComputedStyle(document.body), text = document.querySelector('svg.plot text');
  parent.postMessage({
    width: wide, scroll: document.documentElement.scrollWidth,
    over: over.map(e => e.tagName + '.' + e.className),
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: document.images.length,
    plots: [...document.querySelectorAll('svg.plot')].filter(s => s.checkVisibility())
      .map(s => s.clientHeight),
    cut: [...document.querySelectorAll('svg.plot text')].filter(t => t.checkVisibility()).filter(t => {
      const inner = t.getBoundingClientRect(), outer = t.closest('svg').getBoundingClientRect();
      return inner.left < outer.left - 2 || inner.right > outer.right + 2
          || inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2;
    }).map(t => t.textContent),
    titles: [...document.querySelectorAll('.gallery .title')].map(t => t.clientHeight),
    rows: [...document.querySelectorAll('.results tbody tr')].map(r => r.clientHeight),
    blocks: [...document.querySelectorAll('.block')].filter(b => b.checkVisibility()).length,
    colour: style.color, background: style.backgroundColor, axis: getComputedStyle(text).fill,
  }, '*');
})</script>"""
FRAME = """<!doctype html><body style="margin:0">
<iframe src="probed.html" style="border:0;width:{}px;height:{}px"></iframe>
<script>onmessage = m => document.body.dataset.found = JSON.stringify(m.data)</script>"""


def chromium(folder: Path, *arguments: str) -> str:
    """Run the browser with a profile of its own and return what it prints."""
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def framed(report: Path, folder: Path, width: int, height: int) -> str:
    """A page that shows the report in a frame of this size: narrower than a browser window may be."""
    (folder / "probed.html").write_text(report.read_text().replace("</body>", PROBE + "</body>"))
    (folder / "frame.html").write_text(FRAME.format(width, height))
    return (folder / "frame.html").as_uri()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen_and_is_readable(report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    address = framed(report, tmp_path, width, 1200)
    picture = tmp_path / "screen.png"
    size = f"--window-size={width},1200"
    dump = chromium(tmp_path, SCHEMES[scheme], size, "--virtual-time-budget=4000", "--dump-dom", address)
    match = re.search(r'data-found="([^"]*)"', dump)
    assert match, "the page did not load"
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    assert (found["width"], found["scroll"], found["over"]) == (width, width, [])
    assert found["images"] > 100 and found["broken"] == 0
    assert len(found["plots"]) > 8 and min(found["plots"]) > 80
    assert found["cut"] == []
    assert max(found["rows"]) < 80  # no name is broken into letters
    assert found["blocks"] == 1  # one block is chosen
    assert (luminance(found["background"]) > luminance(found["colour"])) == (scheme == "light")
    assert contrast(found["colour"], found["background"]) > 10
    assert contrast(found["axis"], found["background"]) > 4.5

    chromium(tmp_path, SCHEMES[scheme], size, f"--screenshot={picture}", address)
    pixels = np.asarray(Image.open(picture).convert("L"), float)
    assert pixels.shape[0] == 1200 and pixels.std() > 20
    assert (np.median(pixels) > 200) == (scheme == "light")


@pytest.mark.parametrize("width", [390, 1280])
def test_prompts_are_laid_out_beside_their_images(text_report: Path, tmp_path: Path, width: int) -> None:
    address = framed(text_report, tmp_path, width, 1200)
    size = f"--window-size={width},1200"
    dump = chromium(tmp_path, SCHEMES["light"], size, "--virtual-time-budget=4000", "--dump-dom", address)
    match = re.search(r'data-found="([^"]*)"', dump)
    assert match, "the page did not load"
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    assert (found["width"], found["scroll"], found["over"]) == (width, width, [])
    assert found["broken"] == 0 and found["cut"] == []
    assert found["blocks"] == 2  # one of the maps, one of the words
    assert max(found["titles"]) < 160  # long prompts are cut off


def test_it_prints_light_with_the_details_open(report: Path, tmp_path: Path) -> None:
    paper = tmp_path / "paper.pdf"
    chromium(tmp_path, SCHEMES["dark"], "--no-pdf-header-footer", f"--print-to-pdf={paper}", report.as_uri())
    content = paper.read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 14
    pictures = set(re.findall(r'<img src="([^"]+)"', report.read_text()))  # of every block, not of one
    assert len(re.findall(rb"/Subtype\s*/Image\b", content)) >= len(pictures)
