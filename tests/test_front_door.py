"""Version, what comes next, model cards, and the way to the hub."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import FEW_IMAGES, command, sets

from shd_diffusion import hub_upload
from shd_diffusion.config import parse_yaml
from shd_diffusion.model_card import card
from shd_diffusion.run_folder import RunFolder, run_name


def test_version() -> None:
    assert command("--version") == (0, importlib.metadata.version("shd-diffusion") + "\n", "")


def test_a_stage_says_what_comes_next(runs: Path) -> None:
    run = runs / "teacher"
    code, _, errors = command("sample", run, *sets(*FEW_IMAGES))
    assert code == 0 and errors.splitlines()[-1] == f"done; next: shd-diffusion evaluate {run}"
    code, _, errors = command("evaluate", run)
    assert code == 0 and errors.splitlines()[-1] == f"done; next: shd-diffusion report {run}"


def test_a_reference_is_taken_as_it_is_written_and_lost_metrics_are_told(runs: Path, tmp_path: Path) -> None:
    run, place = runs / "teacher", tmp_path / "ref #2: pics"
    assert command("sample", run, *sets(*FEW_IMAGES))[0] == 0
    shutil.copytree(run / "samples", place)
    assert command("evaluate", run)[0] == 0
    code, output, errors = command("evaluate", run, "--reference", place, "--metrics", "fid")
    assert code == 0 and abs(json.loads(output)["fid"]) < 1e-3, errors  # its own images
    assert "metrics.json: replaced; it had " in errors and "kid_mean" in errors
    assert command("evaluate", run)[0] == 0


def test_a_folder_called_steps_is_a_folder(tmp_path: Path) -> None:
    for name, told in (("three", "three"), ("step-00000005", "run at step 5")):
        assert run_name(tmp_path / "run" / "steps" / name) == told


def test_a_run_has_a_card_with_its_metrics(runs: Path) -> None:
    run = RunFolder(runs / "teacher")
    assert command("sample", run.path, *sets(*FEW_IMAGES))[0] == 0
    code, output, _ = command("evaluate", run.path)
    assert code == 0
    text = (run.pipeline / "README.md").read_text()
    assert text == card(run)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "diffusers", "tags": ["diffusion"]}
    assert f"| fid | {json.loads(output)['fid']:.5g} |" in body
    written = body.split("```yaml\n")[1].split("```")[0]
    assert parse_yaml(written) == parse_yaml(run.config_file.read_text())
    code = body.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("num_inference_steps=25", "num_inference_steps=2"), names)
    assert len(names["images"]) == 2


def test_a_card_has_no_metrics_of_an_earlier_step(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs / "teacher", tmp_path / "run"))
    assert "| fid |" in card(run)
    metrics = json.loads(run.evaluation_file.read_text())
    metrics["protocol"]["steps_trained"] -= 1
    run.evaluation_file.write_text(json.dumps(metrics))
    assert "| fid |" not in card(run) and "Not evaluated yet" in card(run)


def test_a_card_names_the_terms_that_counted(runs: Path) -> None:
    """Not `variance`, which has a weight, but no model here learns one."""
    assert "Losses and their weights: denoise (1), output (1), shd (20)." in card(RunFolder(runs / "kd-shd"))


def test_a_card_imports_the_classes_that_diffusers_has_not(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs / "teacher", tmp_path / "run"))
    assert "import shd_diffusion.models" not in card(run)
    index = json.loads((run.pipeline / "model_index.json").read_text())
    index["vae"] = ["shd_diffusion.models.tiny_autoencoder", "PooledAutoencoderTiny"]
    (run.pipeline / "model_index.json").write_text(json.dumps(index))
    assert "import shd_diffusion.models" in card(run)


class Hub:
    """Stands in for the hub's client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> str:
        if "/" not in name:
            raise ValueError("Repo id must be owner/name\nand more")
        self.calls.append(("create", {"name": name, **options}))
        return f"https://hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("card", options))


def test_push_sends_the_pipeline(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, run = Hub(), RunFolder(runs / "teacher")
    monkeypatch.setattr(hub_upload, "HfApi", lambda: hub)
    assert hub_upload.push(run, "me/digits", private=True) == "https://hub/me/digits"
    (_, created), (_, sent), (_, own) = hub.calls
    assert created == {"name": "me/digits", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/digits" and sent["folder_path"] == run.pipeline
    assert "README.md" in sent["ignore_patterns"] and own["path_in_repo"] == "README.md"
    text = own["path_or_fileobj"].decode()  # loads from the hub, not from a folder of this machine
    assert 'from_pretrained("me/digits"' in text and str(run.pipeline) not in text.partition("## How")[0]
    summary = run.summary_file.read_text().replace('"train-teacher"', '"compress"')
    small = RunFolder(tmp_path)
    small.summary_file.write_text(summary)
    (tmp_path / "model_index.json").write_text("{}")
    hub_upload.push(small, "me/small")
    _, (_, sent) = hub.calls[3:]  # with the words that `compress` wrote
    assert sent["folder_path"] == tmp_path and "README.md" not in sent["ignore_patterns"]
    code, _, errors = command("push", run.path, "digits")
    assert (
        code == 2
        and errors.startswith("error: digits: the hub does not take it (")
        and errors.count("\n") == 1
    )


def test_only_finished_runs_are_pushed(tmp_path: Path) -> None:
    code, _, errors = command("push", tmp_path, "me/nothing")
    assert code == 2 and "its training has not ended" in errors
