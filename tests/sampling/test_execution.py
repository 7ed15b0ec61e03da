"""Half precision, attention backends, compilation and TF32: the same images but for rounding, and another protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, sets
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from random_runs import random_dit_pipeline
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import nn

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.sampling import sample_images
from shd_diffusion.sampling.by_class import ByClass
from shd_diffusion.sampling.by_prompt import ByPrompt
from shd_diffusion.sampling.execution import as_written, denoiser_of, matmul_precision, set_execution

FEW = ["sample.num_images=4", "sample.num_inference_steps=3", "sample.pass_size=2"]


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_near_float32_after_guided_steps(dtype: torch.dtype, most: float) -> None:
    config = SampleConfig(num_inference_steps=8, guidance_scale=2.0)
    pipeline = random_dit_pipeline()
    expected = sample_images(pipeline, range(2), config)
    pipeline.denoiser.to(dtype)
    found = sample_images(pipeline, range(2), config)
    assert expected.std() > 0.1 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=most)


def test_the_usual_execution_is_not_told_and_any_other_is() -> None:
    pipeline = random_dit_pipeline()
    usual = ByClass(pipeline, SampleConfig()).settings()
    assert not {"attention", "compile", "allow_tf32"} & usual.keys() and usual["dtype"] == "float32"
    for changes in ({"compile": True}, {"allow_tf32": True}, {"attention": "native"}, {"dtype": "bfloat16"}):
        told = ByClass(pipeline, SampleConfig(**changes)).settings()
        assert told == usual | changes


def test_two_evaluations_of_different_execution_are_told_apart(run: Path, tmp_path: Path) -> None:
    files = []
    for name, more in (("plain", []), ("tf32", ["sample.allow_tf32=true"])):
        images = tmp_path / name
        assert command("sample", run, "--output", images, *sets(*FEW, *more))[0] == 0
        files.append(tmp_path / f"{name}.json")
        protocol = json.loads((images / "sampling.json").read_text())["protocol"]
        files[-1].write_text(json.dumps({"fid": 1.0, "protocol": protocol}))
    code, _, errors = command("compare", *files)
    assert code == 2 and errors.endswith("their protocols differ; allow_tf32: – | True\n")
    code, _, errors = command(
        "sample", run, "--output", tmp_path / "plain", *sets(*FEW, "sample.allow_tf32=true")
    )
    assert code == 2 and "made with another `allow_tf32` (None, now True)" in errors


def test_tf32_ends_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    pipeline = random_dit_pipeline()
    pipeline.denoiser.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    for allowed, expected in ((True, "high"), (False, "highest")):
        ByClass(pipeline, SampleConfig(num_inference_steps=1, allow_tf32=allowed)).images([0])
        assert seen.pop() == expected and torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), matmul_precision(SampleConfig(allow_tf32=True)):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_backend_is_for_one_model_alone_and_changes_rounding_alone() -> None:
    pipeline, other = (PIPELINES["flux-schnell"]() for _ in range(2))
    pipeline.set_progress_bar_config(disable=True)
    model, untouched = denoiser_of(pipeline), denoiser_of(other)
    config = SampleConfig(num_inference_steps=2, pipeline_arguments=ARGUMENTS.get("flux-schnell", {}))
    expected = ByPrompt(pipeline, config, ["owl"], SIZE).images([0])
    config = config.model_copy(update={"attention": "_native_math"})
    set_execution(model, config)

    def backends(of: ModelMixin) -> set[Any]:
        processors = [getattr(module, "processor", None) for module in of.modules()]
        return {each._attention_backend for each in processors if hasattr(each, "_attention_backend")}

    assert backends(model) == {"_native_math"} and backends(untouched) == {None}
    assert _AttentionBackendRegistry._active_backend == "native"
    with as_written(model, config):
        assert backends(model) == {None}
    assert backends(model) == {"_native_math"}
    sampler = ByPrompt(pipeline, config, ["owl"], SIZE)
    assert sampler.settings()["attention"] == "_native_math"
    assert (sampler.images([0]).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sample.attention=nativ"], "key `sample.attention` is nativ; did you mean `native`?"),
        (["sample.attention=native"], "lets no backend be chosen for a DiTTransformer2DModel; remove it"),
        (
            ["sample.compile=true"],
            "key `sample.compile` is true: the denoiser cannot be executed so (no compiler)",
        ),
    ],
)
def test_what_cannot_be_executed_is_one_line_before_anything_is_written(
    settings: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_later(model: nn.Module) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("no\ncompiler")

        model.register_forward_pre_hook(fail)

    monkeypatch.setattr(ModelMixin, "compile", compile_later)
    code, _, errors = command("sample", run, *sets(*FEW, *settings))
    (line,) = [each for each in errors.splitlines() if each.strip() and "Loading" not in each]
    assert code == 2 and line.startswith(f"error: {run / 'config.yaml'}: ") and message in line
    assert not (run / "samples").exists()


def test_a_missing_library_of_a_backend_is_one_line() -> None:
    model = denoiser_of(PIPELINES["flux-schnell"]())
    with pytest.raises(UserError, match=r"key `sample.attention` is sage: .*sageattention"):
        set_execution(model, SampleConfig(attention="sage"))


def test_a_compiled_denoiser_makes_the_same_images(
    monkeypatch: pytest.MonkeyPatch, random_pipeline: Callable[..., Any]
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(ModelMixin, "compile", lambda model: nn.Module.compile(model, backend=backend))
    pipeline = random_pipeline()
    config = SampleConfig(num_inference_steps=3, compile=True)
    expected = sample_images(pipeline, range(2), config)
    set_execution(pipeline.denoiser, config)
    with as_written(pipeline.denoiser, config):
        assert torch.equal(sample_images(pipeline, range(2), config), expected) and not graphs
    torch.testing.assert_close(sample_images(pipeline, range(2), config), expected, rtol=0, atol=1e-5)
    assert len(graphs) == 1  # one graph, compiled once for all steps
