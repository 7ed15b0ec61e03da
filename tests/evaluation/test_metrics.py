"""The registry of metrics, and what is seen to be wrong with an evaluation's settings before a training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import check_settings, compute_metrics
from shd_diffusion.evaluation.metric import Column, Metric, Need
from shd_diffusion.evaluation.metrics import METRICS, choose_metrics, columns, higher_is_better


def test_a_metric_is_one_entry(digits, monkeypatch):
    """A registered metric is computed, noted in the protocol, listed as a column, and refused where a need is unmet."""
    spread = Metric(
        "spread",
        lambda inputs: (inputs.features.double().var(dim=0).sum().item(), 0.5),
        (Column("spread_mean", "Spread", "Spr", "higher", ".1f", "spread_std"),),
        needs=(Need.REFERENCE_IMAGES,),
        usual=True,
        protocol=lambda inputs: f"of {len(inputs.features)}",
        caution=lambda inputs: "of no use",
    )
    monkeypatch.setitem(METRICS, "spread", spread)
    found = compute_metrics(digits[0][:70], "digits", EvaluateConfig())
    assert found["spread_mean"] > 0 and found["spread_std"] == 0.5
    assert found["protocol"]["spread"] == "of 70" and found["warnings"] == ["of no use"]
    assert columns()[-1].title == "Spread" and higher_is_better("spread_mean")
    assert spread not in choose_metrics(None, {Need.LABELS})
    with pytest.raises(UserError, match="`spread` needs reference images, not only their statistics"):
        choose_metrics(["spread"], set())


def test_every_column_is_written_under_its_key(digits):
    labels = digits[1][:100]
    # these need other extractors, or captions
    others = ("sfid", "cmmd", "clip_score", "r_precision", "picture_precision")
    names = [name for name in METRICS if name not in others]
    found = compute_metrics(digits[0][:100], "digits", EvaluateConfig(metrics=names), labels.tolist())
    expected = {
        key for name in names for each in METRICS[name].columns for key in (each.key, each.deviation) if key
    }
    assert found.keys() - expected == {"per_class_fid", "protocol", "warnings"}
    printed = {each.key: format(found[each.key], each.format) for each in columns() if each.key in found}
    assert printed["fid"] == f"{found['fid']:.2f}" and printed["label_accuracy"].endswith("%")
    higher = {"inception_score_mean", "precision", "recall", "density", "coverage"}
    higher |= {"label_accuracy", "clip_score", "r_precision", "picture_precision"}
    assert {each.key for each in columns() if higher_is_better(each.key)} == higher


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"metrics": ["fidd"]}, r"evaluate\.metrics: `fidd` is unknown; did you mean `fid`\?"),
        ({"metrics": ["zzz"]}, r"evaluate\.metrics: `zzz` is unknown; known here: fid, .*per-class"),
        ({"metrics": ["sfid"]}, "evaluate.metrics: `sfid` needs spatial Inception features"),
        ({"metrics": ["cmmd"]}, "evaluate.metrics: `cmmd` needs a CLIP extractor"),
        ({"extractor": "inception-v3-compat", "metrics": ["accuracy"]}, "`accuracy` needs a classifier of"),
        ({"extractor": "dinov2-vit-s-14", "metrics": ["is"]}, "`is` needs an extractor with logits"),
        ({"extractor": "inception-v3"}, r"evaluate\.extractor: .* did you mean `inception-v3-compat`\?"),
        ({"extractor_weights": "nowhere.pth"}, "evaluate.extractor_weights: nowhere.pth is missing"),
        ({"reference": "nowhere"}, "evaluate.reference: nowhere is no data set"),
    ],
)
def test_wrong_settings_are_seen_before_a_training(settings, says):
    with pytest.raises(UserError, match=says) as refused:
        check_settings(EvaluateConfig(**settings), "digits")
    assert "\n" not in str(refused.value)


def test_right_settings_pass_and_weights_to_be_downloaded_are_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("downloaded"))
    check_settings(EvaluateConfig(metrics=["fid", "per-class", "accuracy"]), "digits")
    assert capsys.readouterr().err == ""
    check_settings(EvaluateConfig(), "image_folder")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the weights of `inception-v3-compat` are not on this machine" in told
    save_file({}, tmp_path / "weights.safetensors")
    check_settings(EvaluateConfig(extractor_weights=str(tmp_path / "weights.safetensors")), "cifar10")
    assert capsys.readouterr().err == ""
