"""Metrics are compared under one protocol only."""

from __future__ import annotations

import pytest

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compare_metrics

METRICS = {
    "fid": 10.0,
    "per_class_fid": {"0": 1.0},
    "protocol": {"num_inference_steps": 25, "steps_trained": 100, "versions": {"torch": "2"}},
    "warnings": [],
}


def test_the_same_protocol():
    better = METRICS | {"fid": 8.5, "protocol": METRICS["protocol"] | {"steps_trained": 200}}
    assert compare_metrics(METRICS, better) == {"fid": {"first": 10.0, "second": 8.5, "difference": -1.5}}


def test_what_differs_between_comparisons_with_teachers_is_said(capsys):
    def of(**protocol: str) -> dict:
        measured = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2}
        per_image = {"latent_mse": [0.4, 0.6]}
        against = {"latent_mse": measured, "per_image": per_image, "protocol": {"seed": 0, **protocol}}
        return METRICS | {"against_teacher": against}

    first = of(teacher_sha256="1f")
    assert compare_metrics(first, first)["against_teacher.latent_mse"]["difference"] == 0
    assert compare_metrics(first, METRICS).keys() == {"fid"} and capsys.readouterr().err == ""
    assert compare_metrics(first, of(teacher_sha256="2f")).keys() == {"fid"}
    line = "against_teacher: left out, the protocols differ; teacher_sha256: 1f | 2f\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("content", [None, 5, [], {}, {"runs/a": METRICS}, {"fid": 1.0, "protocol": [1]}])
def test_what_is_no_evaluation_is_refused(content):
    with pytest.raises(UserError, match=r"the second file .* give the `metrics\.json`"):
        compare_metrics(METRICS, content)
    with pytest.raises(UserError, match="the first file"):
        compare_metrics(content, METRICS)


def test_another_protocol_is_refused_with_the_differing_lines():
    other = METRICS | {
        "protocol": {"num_inference_steps": 50, "versions": {"torch": "3"}, "guidance_scale": 1.5}
    }
    with pytest.raises(UserError) as refused:
        compare_metrics(METRICS, other)
    assert str(refused.value).split("; ")[1:] == [
        "num_inference_steps: 25 | 50",
        "versions.torch: 2 | 3",
        "guidance_scale: – | 1.5",
    ]
    assert compare_metrics(METRICS, other, anyway=True)["fid"]["difference"] == 0


def test_the_same_data_elsewhere_compare():
    def of(reference: str, sha256: str | None) -> dict:
        return METRICS | {"protocol": {"reference": reference, "reference_sha256": sha256, "other": {}}}

    assert compare_metrics(of("a", "1f"), of("b", "1f"))["fid"]["difference"] == 0
    for other in (of("b", "2f"), of("b", None)):
        with pytest.raises(UserError, match="their protocols differ; reference: a"):
            compare_metrics(of("a", other["protocol"]["reference_sha256"] and "1f"), other)
