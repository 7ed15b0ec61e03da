"""The distances call real images better than the same spoilt: the sanity table of docs/metrics.md, on digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sanity_of_metrics import ONE_CLASS, SPOILT, main, split

from shd_diffusion.errors import UserError


def test_real_digits_are_called_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "table.json"
    main("digits", ["digits-classifier"], images=70, reference=1000, output=output)
    table = json.loads(output.read_text())["figures"]["digits-classifier"]
    assert list(table) == [*SPOILT, ONE_CLASS]
    for key in ("fid", "kid_mean", "mind"):
        assert min(table, key=lambda row: table[row][key]) == "real", key
    assert capsys.readouterr().out.startswith("|digits-classifier|FID|KID|MIND|IS|")


def test_no_image_is_on_both_sides() -> None:
    labels = torch.arange(90) % 3
    reference, others, of_one_class = split(labels, 15, 30)
    assert labels[reference].bincount().tolist() == [10, 10, 10]
    assert labels[others].bincount().tolist() == [5, 5, 5]
    assert len(of_one_class) == 15 and (labels[of_one_class] == 0).all()
    assert not set(reference.tolist()) & {*others.tolist(), *of_one_class.tolist()}
    with pytest.raises(UserError, match="of 3 classes with 30 images or more"):
        split(labels, 21, 60)
