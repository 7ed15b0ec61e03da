"""Captioned pictures without a download: Debian's colour emoji, drawn by Pillow, with their Unicode names."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from shd_diffusion.data.image_sets import Images
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import sha256

DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
DRAWN_SIZE = 109  # the only size that this font has its bitmaps in
SPLITS = ("train", "test")
TEST_SHARE = 10  # one name in so many
MAX_LENGTH = 48  # characters of a name: a text encoder's 16 tokens hold it, with the style


class Emoji(Images):
    """The symbols of a font, each with its name as the caption, and with its name and the font's as another.

    Test and train share no name: a hash of the name says where it belongs, whatever the font and its version.

    Args:
        size: images are (3, size, size), on white.
        split: `train` or `test`.
        font: a font file; None for that of Debian's package fonts-noto-color-emoji.

    Attributes:
        names: of all pictures, lower case.

    Raises:
        UserError: there is no such font or split, or the font has no symbols.
    """

    def __init__(self, size: int, split: str = "train", font: Path | None = None) -> None:
        if split not in SPLITS:
            raise UserError(f"data.split: `emoji` has no split `{split}`; known here: {', '.join(SPLITS)}")
        self.shape, self.split, self.font_file = (3, size, size), split, font or DEBIAN_FONT
        if font is None and not DEBIAN_FONT.is_file():
            raise UserError(
                f"data.path: the font {DEBIAN_FONT} is missing; `apt-get install fonts-noto-color-emoji`, "
                "or give the path of another font file with colour emoji"
            )
        try:
            self._font = ImageFont.truetype(self.font_file, DRAWN_SIZE)
            with TTFont(self.font_file, lazy=True) as tables:
                named = {code: symbol_name(chr(code)) for code in sorted(tables.getBestCmap() or {})}
        except (OSError, TTLibError) as error:
            raise UserError(
                f"data.path: {self.font_file}: not a readable font ({one_line(error)}); give a .ttf file"
            ) from None
        drawn = {code: name for code, name in named.items() if name and is_test(name) == (split == "test")}
        if not drawn:
            raise UserError(f"data.path: {self.font_file}: no symbols with a name in it; give another font")
        self.codes, self.names = list(drawn), [name for name in drawn.values() if name]
        self.style = f"{str(self._font.getname()[0]).split()[0].lower()} style"

    def __len__(self) -> int:
        return len(self.codes)

    def image(self, index: int) -> Tensor:
        return pil_to_tensor(draw(chr(self.codes[index]), self._font, self.shape[1]))

    def captions(self, index: int) -> list[str]:
        return [self.names[index], f"{self.names[index]}, {self.style}"]

    def name(self, index: int) -> str:
        return f"{self.font_file}: U+{self.codes[index]:04X} ({self.names[index]})"

    def fingerprint(self) -> str:
        parts = (sha256(self.font_file), self.shape, self.codes, self.names, self.style)
        return hashlib.sha256(str(parts).encode()).hexdigest()


def symbol_name(character: str) -> str | None:
    """The Unicode name of a symbol, lower case; None of what is no symbol, half a flag, a number, or long.

    In names from before there were colours (below U+1F000) black and white mean filled and outlined: the "heavy black
    heart" is red. There these words are left out, but of squares and circles, of which they are true.
    """
    name = unicodedata.name(character, "").lower()
    if unicodedata.category(character) not in ("So", "Sm") or not name:
        return None
    if name.startswith("regional indicator") or "cjk" in name or len(name) > MAX_LENGTH:
        return None
    if ord(character) < 0x1F000 and not re.search("square|circle", name):
        name = re.sub(r"\b(black|white|heavy) ", "", name)
    return name


def is_test(name: str) -> bool:
    """Whether a name is held out."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % TEST_SHARE == 0


def draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """A character in its colours in the centre of a white square, RGB."""
    left, top, right, bottom = font.getbbox(character)
    side = max(right - left, bottom - top)
    corner = ((side - right - left) / 2, (side - bottom - top) / 2)
    picture = Image.new("RGB", (round(side), round(side)), "white")
    ImageDraw.Draw(picture).text(corner, character, "black", font, embedded_color=True)
    return picture.resize((size, size), Image.Resampling.LANCZOS)
