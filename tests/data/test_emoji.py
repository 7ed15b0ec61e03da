"""Pictures of a font's symbols: which, what they are called, and what is drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import torch

from shd_diffusion.data.datasets import DataConfig, open_dataset
from shd_diffusion.data.emoji import DEBIAN_FONT, SPLITS, Emoji, is_test, symbol_name
from shd_diffusion.errors import UserError

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # any font has some symbols
SIZE = 16


@pytest.fixture(scope="module")
def splits() -> dict[str, Emoji]:
    return {split: Emoji(SIZE, split, FONT) for split in SPLITS}


def test_every_picture_has_its_name_as_a_caption_and_another_with_its_style(splits: dict[str, Emoji]) -> None:
    names = [name for split in splits.values() for name in split.names]
    assert {"umbrella", "snowman", "heart", "square root"} <= set(names)
    assert all(len(name) <= 48 and name == name.lower() for name in names)
    train = splits["train"]
    assert train.captions(3) == [train.names[3], f"{train.names[3]}, dejavu style"]


def test_test_and_train_share_no_name(splits: dict[str, Emoji]) -> None:
    train, test = (set(splits[split].names) for split in ("train", "test"))
    assert not train & test
    assert 0.07 < len(test) / len(test | train) < 0.13
    assert all(map(is_test, test)) and not any(map(is_test, train))


def test_a_picture_is_in_the_centre_of_a_white_square(splits: dict[str, Emoji]) -> None:
    train = splits["train"]
    picture = train.image(train.names.index("black circle")).float()
    assert picture.shape == (3, SIZE, SIZE)
    assert (picture[:, SIZE // 2, SIZE // 2] == 0).all() and picture[:, :, 0].min() > 240
    rows = (255 - picture).mean(0)
    centre = (rows.sum(0) @ torch.arange(SIZE).float()) / rows.sum()
    assert abs(centre - (SIZE - 1) / 2) < 0.5


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("😀", "grinning face"),
        ("❤", "heart"),  # heavy black heart, which is red
        ("☺", "smiling face"),  # white, which is yellow
        ("🖤", "black heart"),
        ("⚫", "medium black circle"),
        ("a", None),
        ("7", None),
        ("🇩", None),
        ("🏽", None),
        ("🈲", None),  # squared cjk unified ideograph-7981
        ("🔂", None),  # a name of 77 characters
        ("\ue000", None),
    ],
)
def test_names(character: str, name: str | None) -> None:
    assert symbol_name(character) == name


def test_the_fingerprint_tells_data_sets_apart(splits: dict[str, Emoji]) -> None:
    others = [Emoji(SIZE * 2, "train", FONT), Emoji(SIZE, "train", FONT.with_name("DejaVuSans-Bold.ttf"))]
    assert len({images.fingerprint() for images in (*splits.values(), *others)}) == 4
    assert Emoji(SIZE, "train", FONT).fingerprint() == splits["train"].fingerprint()


def test_it_is_opened_by_its_name() -> None:
    config = DataConfig(name="emoji", image_size=SIZE, split="test", path=str(FONT))
    assert open_dataset(config).captions(0) == Emoji(SIZE, "test", FONT).captions(0)
    with pytest.raises(ValueError, match="needs the key `image_size`"):
        DataConfig(name="emoji")


def test_faults_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shd_diffusion.data.emoji.DEBIAN_FONT", tmp_path / "Emoji.ttf")
    with pytest.raises(UserError, match=r"Emoji\.ttf is missing; `apt-get install fonts-noto-color-emoji`"):
        Emoji(SIZE)
    (tmp_path / "no-font.ttf").write_text("no font")
    for font in ("no-font.ttf", "no-file.ttf"):
        with pytest.raises(UserError, match=rf"data\.path: .*{font}: not a readable font"):
            Emoji(SIZE, "train", tmp_path / font)
    with pytest.raises(UserError, match=r"data\.split: `emoji` has no split `val`; known here: train, test"):
        Emoji(SIZE, "val", FONT)


@pytest.mark.skipif(not DEBIAN_FONT.is_file(), reason="apt-get install fonts-noto-color-emoji")
def test_debians_font_has_some_1300_pictures_in_colour() -> None:
    train, test = Emoji(64), Emoji(64, "test")
    assert 1250 < len(train) + len(test) < 1450
    assert train.captions(0)[1].endswith(", noto style")
    red = train.image(train.names.index("large red circle"))[:, 32, 32]
    green = train.image(train.names.index("large green square"))[:, 32, 32]
    assert red[0] > 200 and red[1:].max() < 100
    assert green[1] > 150 and green[0] < 150 and green[2] < 100
