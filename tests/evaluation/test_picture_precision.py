"""R-precision against pictures, held against its definition; where captions come from; what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from shd_diffusion.config import EvaluateConfig, EvaluationConfig, override_config
from shd_diffusion.data import DataConfig, reference_images
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import check_settings, compute_metrics
from shd_diffusion.evaluation.picture_precision import Captioned, own_picture_first, shared_captions
from shd_diffusion.randomness import generator

NAME = "picture_precision"


@pytest.mark.parametrize("among", [6, 100])
def test_it_is_its_definition(among: int) -> None:
    """Against a loop: captions with several pictures, pictures with several captions."""
    rng = np.random.default_rng(0)
    captions = [[f"c{i % 20}", f"c{i % 20}, style"] if i % 3 else [f"c{i % 20}"] for i in range(45)]
    pictures = rng.standard_normal((45, 6))
    prompts = [captions[i % 45][-1] for i in range(60)]
    images = np.stack([pictures[i % 45] + 1.3 * rng.standard_normal(6) for i in range(60)])
    known = list(dict.fromkeys(chain(*captions)))

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        random = generator(3, NAME, known.index(prompt))
        order = [known[number] for number in torch.randperm(len(known), generator=random).tolist()]
        apart = [other for other in order if not any({other, prompt} <= set(of_one) for of_one in captions)]
        others = [other for other in apart if other != prompt][: among - 1]
        nearest = {
            caption: max(cosine(image, pictures[i]) for i in range(45) if caption in captions[i])
            for caption in (prompt, *others)
        }
        expected.append(all(nearest[prompt] > nearest[other] for other in others))
    sides = torch.from_numpy(images), prompts, torch.from_numpy(pictures), captions
    found = own_picture_first(*sides, among=among, seed=3)
    assert found.tolist() == expected and 10 < sum(expected) < 50
    # the others follow from the caption alone, not from which images there are
    assert own_picture_first(sides[0][7:9], prompts[7:9], *sides[2:], among, 3).tolist() == expected[7:9]


def test_equal_pictures_of_two_captions_are_no_success() -> None:
    pictures = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 0.0, 0.0]])
    found = own_picture_first(pictures, ["a", "b", "c"], pictures, [["a"], ["b"], ["c"]])
    assert found.tolist() == [False, False, True]


def test_which_prompts_can_be_judged() -> None:
    captions = [["emoji", " cat "], ["emoji", "dog"]]
    assert Captioned(captions).pictures == {"emoji": [0, 1], "cat": [0], "dog": [1]}
    # there is no picture that "emoji" could be told from
    assert shared_captions(["cat\n", "dog", "emoji", "a bird"], captions) == {"cat", "dog"}
    assert shared_captions([], captions) == shared_captions(["cat"], []) == set()


@pytest.fixture
def reference(captioned: Path, tmp_path: Path, digits: tuple[Tensor, Tensor]) -> DataConfig:
    """12 captioned pictures of 32 pixels and one that cannot be read, the fourth."""
    folder = Path(shutil.copytree(captioned, tmp_path / "pictures"))
    (folder / "02b.png").write_bytes(b"no picture")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "02b.png", "text": "what is not there"}) + "\n")
    return DataConfig(name="image_folder", path=str(folder), image_size=8, caption_column="text")


def test_captions_stay_with_their_pictures_where_one_cannot_be_read(reference: DataConfig) -> None:
    real = reference_images(reference)
    assert [Path(real.name(i)).name for i in range(4)] == ["00.png", "01.png", "02.png", "03.png"]
    assert real.captions() == [[f"a {'abcdef'[i // 2]} picture"] for i in range(12)]
    without = reference.model_copy(update={"caption_column": None})
    assert reference_images(without).captions() is None


def test_real_pictures_are_nearest_to_themselves(reference: DataConfig) -> None:
    real = reference_images(reference)
    captions = [of_one[0] for of_one in real.captions() or []]
    images = torch.stack([real[i] for i in range(12)])
    config = EvaluateConfig(extractor="digits-classifier", reference=reference)
    for _ in range(2):  # the second time the reference's features are kept ones
        found = compute_metrics(images, None, config, prompts=[*captions[:10], "else", "more"])
        low = stats.binomtest(5, 5).proportion_ci(0.95, method="wilson").low
        assert (found[NAME], found[f"{NAME}_high"]) == (1, 1)
        assert found[f"{NAME}_low"] == pytest.approx(low)
    assert found["protocol"][NAME] == "among 6 captions of the reference, seed 0"
    assert found["protocol"]["reference"] == f"image_folder {reference.path} 8 px"
    caution = next(warning for warning in found["warnings"] if "pictures" in warning)
    assert "is of 10 images, as the prompts of 2 others are no captions" in caution
    assert "is among 6 captions, all of the reference" in caution
    # every image next to a picture of another caption
    assert compute_metrics(images, None, config, prompts=[*captions[6:], *captions[:6]])[NAME] == 0


def test_what_it_needs(reference: DataConfig) -> None:
    real = reference_images(reference)
    images = torch.stack([real[i] for i in range(12)])

    def says(prompts: list[str] | None, **keys: object) -> str:
        config = EvaluateConfig(extractor="digits-classifier", reference=reference.model_copy(update=keys))
        assert NAME not in compute_metrics(images, None, config, prompts=prompts)
        named = config.model_copy(update={"metrics": [NAME]})
        with pytest.raises(UserError) as raised:
            compute_metrics(images, None, named, prompts=prompts)
        return str(raised.value)

    assert "needs prompts of the images" in says(None)
    assert "needs captions of the reference images, `caption_column`" in says(["a"] * 12, caption_column=None)
    assert "two or more different prompts that are captions of" in says([*["a a picture"] * 11, "else"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("3", "key `evaluate.reference` is 3: input should be a valid string"),
        ("{name: huggingface, path: a/b}", "key `evaluate.reference`: `huggingface` needs the key `image_size`"),
        ("{name: digits, splitt: test}", "unknown key `evaluate.reference.splitt`; did you mean `split`?"),
        ("{name: image_folder, path: nowhere, image_size: 8}", "evaluate.reference: data.path: nowhere"),
        ("{name: prompts, path: a.txt, image_size: 8}", "evaluate.reference.name: `prompts` has no images"),
    ],
)  # fmt: skip
def test_references_that_cannot_be_had(setting: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        config = override_config(EvaluationConfig(), [f"evaluate.reference={setting}"], "--set")
        check_settings(config.evaluate, "digits")
    assert says in str(raised.value) and "\n" not in str(raised.value)
