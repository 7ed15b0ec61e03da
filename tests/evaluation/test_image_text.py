"""CLIP score, R-precision and CMMD by a CLIP model of transformers, against torchmetrics and their definitions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, sets
from scipy import stats
from tiny_clip import TOKENS, clip_model
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score as clip_score_of_torchmetrics
from torchmetrics.multimodal import CLIPScore

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import check_settings, compute_metrics, load_extractor
from shd_diffusion.evaluation.clip_score import clip_score
from shd_diffusion.evaluation.cmmd import cmmd
from shd_diffusion.evaluation.image_text import ImageTextEncoder, encode_texts, load_image_text_encoder
from shd_diffusion.evaluation.r_precision import own_prompt_first, r_precision, wilson_interval
from shd_diffusion.randomness import generator

PROMPTS = [f"a {letter} picture" for letter in "abcdef" for _ in range(2)]


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> ImageTextEncoder:
    return load_image_text_encoder(str(clip_folder))


class ForTorchmetrics(nn.Module):
    """A CLIP model as torchmetrics 1.9 calls it: transformers 5 no longer returns the features alone."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model.get_text_features(tokens, mask).pooler_output


def test_clip_score_is_that_of_torchmetrics(encoder: ImageTextEncoder, photographs) -> None:
    images = photographs[0]
    texts = encode_texts(encoder, PROMPTS, batch_size=5)
    found = clip_score(encoder.images(images), texts)

    def given():
        return ForTorchmetrics(encoder.model), encoder.processor

    metric = CLIPScore(given)
    for part in (slice(0, 7), slice(7, 12)):
        metric.update(list(images[part]), PROMPTS[part])
    # float32 features of unit length and sums of 12 of them
    assert found == pytest.approx(float(metric.compute()), abs=1e-3) and found > 1
    assert found == pytest.approx(float(clip_score_of_torchmetrics(list(images), PROMPTS, given)), abs=1e-3)


def test_clip_score_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((9, 5)), rng.standard_normal((9, 5))
    texts += images
    cosines = [
        float(np.dot(x, y)) / float(np.linalg.norm(x) * np.linalg.norm(y))
        for x, y in zip(images, texts, strict=True)
    ]
    expected = 100 * max(sum(cosines) / 9, 0)
    assert expected > 1
    assert clip_score(torch.from_numpy(images), torch.from_numpy(texts)) == pytest.approx(expected, rel=1e-12)
    assert clip_score(torch.eye(3), -torch.eye(3)) == 0


def test_a_prompt_has_the_same_features_in_any_batch(encoder: ImageTextEncoder) -> None:
    prompts = ["a cat", "b", "two words or more", "the very end of a longer prompt"]
    together = encoder.texts(prompts)
    for prompt, features in zip(prompts, together, strict=True):
        torch.testing.assert_close(encoder.texts([prompt])[0], features, rtol=1e-4, atol=1e-5)


def test_a_long_prompt_keeps_its_end_token(encoder: ImageTextEncoder) -> None:
    """The feature is the state at the end token: cut off, it would be that of the beginning, the same for all texts."""
    letters = "abcdefghijklmnopqrst"
    assert len(letters) > TOKENS
    kept = letters[: TOKENS - 2]
    tokens = torch.tensor([[0, *(2 + 2 * "abcdefghijklmnopqrstuvwxyz".index(letter) for letter in kept), 1]])
    expected = encoder.model.get_text_features(tokens).pooler_output
    torch.testing.assert_close(encoder.texts([letters]), expected, rtol=1e-4, atol=1e-5)


def test_the_hash_follows_from_weights_and_tokenizer_not_from_use(
    encoder: ImageTextEncoder, clip_folder: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(clip_folder, tmp_path / "moved"))
    assert load_image_text_encoder(str(moved)).sha256 == encoder.sha256  # which has cut and padded texts
    clip_model(seed=1).save_pretrained(moved)
    other = load_image_text_encoder(str(moved))
    assert other.sha256 != encoder.sha256 and other.source == str(moved)


def test_r_precision_ranks_among_drawn_captions() -> None:
    """Against a loop over definitions: the own prompt must be strictly nearer than all that are drawn by index."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((30, 6))
    groups = np.arange(40) % 30
    images = texts[groups] + 1.2 * rng.standard_normal((40, 6))

    def cosine(x, y):
        return x @ y / np.sqrt((x @ x) * (y @ y))

    expected = []
    for index, own in enumerate(groups):
        order = torch.randperm(29, generator=generator(3, "r_precision", index)).tolist()
        others = [[text for text in range(30) if text != own][number] for number in order[:9]]
        assert own not in others and len(set(others)) == 9
        expected.append(
            cosine(images[index], texts[own]) > max(cosine(images[index], texts[o]) for o in others)
        )
    sides = torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(groups)
    found = own_prompt_first(*sides, captions=10, seed=3)
    assert found.tolist() == expected and 5 < sum(expected) < 35
    # among all there are, nothing is drawn
    assert (
        own_prompt_first(*sides, captions=100, seed=0).tolist()
        == own_prompt_first(*sides, captions=30, seed=9).tolist()
    )
    share, low, high = r_precision(*sides, captions=10, seed=3)
    assert share == pytest.approx(sum(expected) / 40) and low < share < high


def test_a_tie_is_no_success_and_one_prompt_cannot_be_told_from_others() -> None:
    same = torch.ones(2, 4)
    assert own_prompt_first(torch.ones(1, 4), same, torch.tensor([0])).tolist() == [False]
    with pytest.raises(ValueError, match="one prompt alone"):
        own_prompt_first(torch.ones(1, 4), same[:1], torch.tensor([0]))


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (7, 7), (3, 11), (950, 1000)])
def test_wilsons_interval_is_that_of_scipy(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes / count, count) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_images_of_a_prompt_count_once_in_the_interval() -> None:
    texts = torch.eye(5)
    groups = torch.arange(5).repeat_interleave(4)
    share, low, high = r_precision(texts[groups], texts, groups)
    assert (share, high) == (1.0, 1.0)
    assert low == pytest.approx(stats.binomtest(5, 5).proportion_ci(0.95, method="wilson").low)


def test_metrics_of_images_with_prompts(captioned: Path, clip_folder: Path, photographs) -> None:
    """One evaluation with `extractor: clip` has CLIP score, R-precision, CMMD and FD by the same features."""
    config = EvaluateConfig(extractor="clip", clip_model=str(clip_folder), batch_size=5)
    found = compute_metrics(captioned, photographs[1], config)
    extractor = load_extractor("clip", clip_model=str(clip_folder))
    assert isinstance(extractor.network, ImageTextEncoder)
    images, reference = extractor(photographs[0]), extractor(photographs[1])
    texts = extractor.network.texts(PROMPTS)
    assert found["clip_score"] == pytest.approx(clip_score(images, texts), rel=1e-4)
    assert found["cmmd"] == pytest.approx(cmmd(images, reference), rel=1e-4)
    assert found["r_precision_low"] < found["r_precision"] < found["r_precision_high"]
    assert found["fid"] > 0
    protocol = found["protocol"]
    assert protocol["r_precision"] == "among 6 captions, seed 0"
    assert protocol["clip_model"]["name"] == str(clip_folder)
    assert protocol["clip_model"]["sha256"] == protocol["extractor_sha256"] == extractor.sha256
    assert any("R-precision is among 6 captions" in warning for warning in found["warnings"])


def test_images_are_compared_with_prompts_beside_any_extractor(clip_folder: Path, digits) -> None:
    images, names = digits[0][:12], ["clip_score", "fid"]
    config = EvaluateConfig(clip_model=str(clip_folder), metrics=names)
    found = compute_metrics(images, "digits", config, prompts=PROMPTS)
    by_clip = config.model_copy(update={"extractor": "clip"})
    expected = compute_metrics(images, digits[0][:100], by_clip, prompts=PROMPTS)
    assert found["clip_score"] == pytest.approx(expected["clip_score"], rel=1e-4)
    assert found["fid"] != expected["fid"]
    assert found["protocol"]["features"] == "digits-classifier"
    assert found["protocol"]["clip_model"] == expected["protocol"]["clip_model"]


def test_prompts_that_are_missing_leave_out_or_refuse(
    clip_folder: Path, photographs, captioned: Path
) -> None:
    config = EvaluateConfig(extractor="clip", clip_model=str(clip_folder))
    assert "clip_score" not in compute_metrics(photographs[0], photographs[1], config)
    same = compute_metrics(photographs[0], photographs[1], config, prompts=["a cat"] * 12)
    assert "clip_score" in same and "r_precision" not in same
    for metrics, says in ((["clip_score"], "needs prompts of the images"), (["cmmd"], None)):
        named = config.model_copy(update={"metrics": metrics})
        if says is None:
            assert compute_metrics(photographs[0], photographs[1], named)["cmmd"] > 0
        else:
            with pytest.raises(UserError, match=says):
                compute_metrics(photographs[0], photographs[1], named)
    with pytest.raises(UserError, match="11 prompts for 12 images"):
        compute_metrics(photographs[0], photographs[1], config, prompts=["a"] * 11)


def test_prompts_need_no_reference(captioned: Path, clip_folder: Path, photographs) -> None:
    """CLIP is the extractor then, so that no Inception is wanted."""
    code, printed, errors = command("evaluate", captioned, *sets(f"evaluate.clip_model={clip_folder}"))
    assert code == 0, errors
    found = json.loads(printed)
    with_reference = EvaluateConfig(extractor="clip", clip_model=str(clip_folder))
    expected = compute_metrics(captioned, photographs[1], with_reference)
    kept = {"clip_score", "r_precision", "r_precision_low", "r_precision_high"}
    assert {key: found[key] for key in kept} == {key: expected[key] for key in kept}
    assert found.keys() == kept | {"protocol", "warnings"}
    assert (found["protocol"]["reference"], found["protocol"]["features"]) == ("none", "clip")
    assert len(found["warnings"]) == 1  # of the few captions; none of covariances
    named = sets(f"evaluate.clip_model={clip_folder}", "evaluate.metrics=[clip_score,fid]")
    code, _, errors = command("evaluate", captioned, *named)
    assert code == 2 and "--reference REF" in errors
    config = EvaluateConfig(clip_model=str(clip_folder), metrics=["clip_score", "fid"], extractor="clip")
    with pytest.raises(UserError, match="`fid` needs a reference, `evaluate"):
        compute_metrics(captioned, None, config)


def test_prompts_that_are_cut_are_told(clip_folder: Path, photographs) -> None:
    prompts = ["a cat", "abcdefghijklmno", "abcdefghijklmn"] * 4  # with two tokens they have 6, 17 and 16
    config = EvaluateConfig(clip_model=str(clip_folder), metrics=["clip_score"])
    found = compute_metrics(photographs[0], None, config, prompts=prompts)
    assert found["warnings"] == [
        "1 of 3 prompts are longer than the CLIP model takes: it saw their beginning"
    ]


def _other_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [(_other_type, "of type `siglip`"), (_without_weights, "model.safetensors"), (_cut, "cannot be loaded")],
)
def test_a_damaged_model_is_one_line(damage, says: str, clip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    damage(folder)
    with pytest.raises(UserError, match=says) as refused:
        load_image_text_encoder(str(folder))
    assert "\n" not in str(refused.value) and str(refused.value).startswith("evaluate.clip_model: ")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip_model": "nowhere"}, "evaluate.clip_model: nowhere is no folder of a CLIP model; give one"),
        ({"extractor": "clip"}, "evaluate.extractor: `clip` is the CLIP model of `evaluate.clip_model`; set"),
        ({"metrics": ["clip_score"]}, "`clip_score` needs a CLIP model for images and texts, `evaluate.clip_model`"),
        ({"metrics": ["r_precision"]}, "`r_precision` needs a CLIP model for images and texts"),
    ],
)  # fmt: skip
def test_wrong_settings_are_seen_before_a_training(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        check_settings(EvaluateConfig(**settings), "digits")
    assert "\n" not in str(refused.value)


def test_a_model_that_is_to_be_downloaded_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    check_settings(EvaluateConfig(clip_model="nobody/clip", metrics=["clip_score"]), "digits")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "nobody/clip is not on this machine and will be downloaded" in told
