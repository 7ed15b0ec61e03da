"""Converted checkpoints against outputs of the authors' code (see tests/golden/README.md), and bad files."""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, ModelMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from golden.float64 import InFloat64
from safetensors.torch import load_file, save_file
from torch import Tensor

import shd_diffusion.models
from shd_diffusion.errors import UserError
from shd_diffusion.models.convert import convert_checkpoint
from shd_diffusion.models.denoiser import num_classes, sample_shape
from shd_diffusion.models.dit import OriginalDiTTransformer2DModel
from shd_diffusion.models.factory import OWN_CLASSES, load_model
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.guidance import guide, power_cosine_scale

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES: dict[str, type[ModelMixin]] = {
    "dit": OriginalDiTTransformer2DModel,
    "mdtv2": MDTv2Transformer2DModel,
}
HEADS = {"dit": 2, "mdtv2": None}
KINDS = pytest.mark.parametrize("kind", ["dit", "mdtv2"])
Kind = Literal["dit", "mdtv2"]
State = dict[str, Tensor]


def recorded(kind: Kind, part: str) -> State:
    tensors = load_file(GOLDEN / f"{kind}.safetensors")
    return {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}


def converted(kind: Kind, folder: Path, state: State) -> ModelMixin:
    save_file(state, folder / "checkpoint.safetensors")
    convert_checkpoint(kind, folder / "checkpoint.safetensors", folder / "model", HEADS[kind])
    return CLASSES[kind].from_pretrained(folder / "model").eval()


# Of the output's largest value. Float64 leaves 2e-15. Float32 rounds the angles t·f of the timestep's embedding by up
# to 1e-4 (t = 999 times 2^-24, of t·f and of f), which the random weights make 6e-5 of the output.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-4}


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@KINDS
@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_outputs_are_the_authors(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(kind, tmp_path, recorded(kind, "checkpoint/")).to(dtype)
    inputs, outputs = recorded(kind, "input/"), recorded(kind, "output/")
    inputs |= {name: inputs[name].to(dtype) for name in ("hidden_states", "timestep")}
    ids_keep = inputs.pop("ids_keep", None)
    null = torch.full_like(inputs["class_labels"], model.config.num_embeds_ada_norm)
    with InFloat64() if dtype == torch.float64 else contextlib.nullcontext():
        found = {"plain": model(**inputs).sample}
        if ids_keep is not None:
            found["masked"] = model(**inputs, ids_keep=ids_keep).sample
        scale = power_cosine_scale(inputs["timestep"], 3.8) if kind == "mdtv2" else 3.8
        unconditional = model(**inputs | {"class_labels": null}).sample
        found["guided"] = guide(found["plain"], unconditional, scale, channels=3)
    assert found.keys() == outputs.keys()
    for name, expected in outputs.items():
        assert found[name].dtype == dtype
        assert deviation(found[name], expected) < TOLERANCES[dtype], name


@KINDS
def test_a_converted_folder_is_a_teacher_and_samples(kind: Kind, tmp_path: Path) -> None:
    converted(kind, tmp_path, recorded(kind, "checkpoint/"))
    model = load_model(str(tmp_path / "model"))
    assert isinstance(model, CLASSES[kind])
    assert num_classes(model) == 5 and sample_shape(model) == (4, 8, 8)
    pipeline = ClassConditionalPipeline(model.eval(), DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded.denoiser, CLASSES[kind])
    latents = torch.randn(2, 4, 8, 8)
    first, second = (
        each([0, 4], num_inference_steps=2, guidance_scale=2.0, latents=latents, output_type="pt").images
        for each in (pipeline, loaded)
    )
    assert torch.equal(first, second) and first.std() > 0.1


def test_own_classes_are_imported_with_their_room() -> None:
    """diffusers loads a pipeline's component only from a module that is already imported."""
    assert OWN_CLASSES.items() <= vars(shd_diffusion.models).items()


@KINDS
@torch.no_grad()
def test_every_parameter_matters_to_the_recorded_outputs(kind: Kind, tmp_path: Path) -> None:
    """Else parity would prove nothing. Biases of keys cannot matter: softmax does not see them."""
    state, inputs = recorded(kind, "checkpoint/"), recorded(kind, "input/")
    model = converted(kind, tmp_path, state)
    before = model(**inputs).sample
    if kind == "mdtv2":
        assert not torch.allclose(before, model(**inputs | {"ids_keep": None}).sample, atol=1e-2)
    for name, parameter in model.named_parameters():
        if "to_k.bias" in name:
            continue
        kept = parameter.clone()
        parameter.zero_()
        assert (model(**inputs).sample - before).abs().max() > 1e-4, name
        parameter.copy_(kept)


@torch.no_grad()
def test_stock_dit_reads_the_folder_but_embeds_timesteps_otherwise(tmp_path: Path) -> None:
    ours = converted("dit", tmp_path, recorded("dit", "checkpoint/"))
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "model").eval()
    inputs, plain = recorded("dit", "input/"), recorded("dit", "output/")["plain"]
    difference = (stock(**inputs).sample - plain).abs().amax(dim=(1, 2, 3)) / plain.abs().max()
    assert inputs["timestep"].tolist() == [0, 501, 999]
    assert (
        difference[0] < 1e-5 and (difference[1:] > 0.01).all()
    )  # at t = 0 every angle is 0, without rounding

    stock.save_pretrained(tmp_path / "stock")
    again = OriginalDiTTransformer2DModel.from_pretrained(tmp_path / "stock").eval()
    assert torch.equal(again(**inputs).sample, ours(**inputs).sample)


@KINDS
@pytest.mark.parametrize("averaged", [False, True])
def test_files_of_torch(kind: Kind, averaged: bool, tmp_path: Path) -> None:
    state = recorded(kind, "checkpoint/")
    file, content = tmp_path / "checkpoint.pt", dict[str, object](state)
    if averaged:  # as DiT's train.py saves: the model beside its average, the optimiser and the command line
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        content = {"model": zeros, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, file)
    convert_checkpoint(kind, file, tmp_path / "model", HEADS[kind])
    model = CLASSES[kind].from_pretrained(tmp_path / "model").eval()
    inputs = recorded(kind, "input/")
    inputs.pop("ids_keep", None)
    plain = recorded(kind, "output/")["plain"]
    assert deviation(model(**inputs).sample, plain) < TOLERANCES[torch.float32]


def blank_dit(width: int) -> State:
    """A DiT of one block by the authors' names and shapes."""
    layers = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "blocks.0.adaLN_modulation.1": (6 * width, width),
        "blocks.0.attn.qkv": (3 * width, width),
        "blocks.0.attn.proj": (width, width),
        "blocks.0.mlp.fc1": (4 * width, width),
        "blocks.0.mlp.fc2": (width, 4 * width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (32, width),
    }
    state = {f"{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in layers.items()}
    state["y_embedder.embedding_table.weight"] = torch.zeros(11, width)
    state["pos_embed"] = get_2d_sincos_pos_embed(width, 2, base_size=2)[None]
    return state


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (1152, 16)])
def test_sizes_of_a_published_dit_follow_from_shapes(width: int, heads: int, tmp_path: Path) -> None:
    save_file(blank_dit(width), tmp_path / "checkpoint.safetensors")
    convert_checkpoint("dit", tmp_path / "checkpoint.safetensors", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["_class_name"] == "OriginalDiTTransformer2DModel"
    expected: dict[str, float] = {"num_attention_heads": heads, "attention_head_dim": width // heads}
    expected |= {"in_channels": 4, "out_channels": 8, "sample_size": 4, "patch_size": 2}
    expected |= {"num_layers": 1, "num_embeds_ada_norm": 10, "norm_eps": 1e-6}
    assert {key: config[key] for key in expected} == expected


Damage = Callable[[State], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (
        lambda state: [state.pop(key) for key in list(state) if "t_embedder.mlp.0" in key],
        "missing: t_embedder.mlp.0.bias, t_embedder.mlp.0.weight",
    ),
    "unexpected": (
        lambda state: state.update({"extra.weight": torch.zeros(1), "another": torch.zeros(1)}),
        "unexpected: another, extra.weight",
    ),
    "misshapen": (
        lambda state: state.update({"final_layer.linear.weight": torch.zeros(32, 8)}),
        "misshapen: final_layer.linear.weight (32, 8) instead of (32, 16)",
    ),
    "all at once": (
        lambda state: (state.pop("t_embedder.mlp.2.bias"), state.update({"extra": torch.zeros(1)})),
        "missing: t_embedder.mlp.2.bias; unexpected: extra",
    ),
    "a size is untold": (lambda state: state.pop("pos_embed"), "missing or misshapen: pos_embed"),
    "odd tokens": (
        lambda state: state.update({"pos_embed": torch.zeros(1, 17, 16)}),
        "misshapen: pos_embed (1, 17, 16) instead of (1, 16, 16)",
    ),
}


@KINDS
@pytest.mark.parametrize("damage", DAMAGES)
def test_keys_that_are_wrong_are_listed(kind: Kind, damage: str, tmp_path: Path) -> None:
    state = recorded(kind, "checkpoint/")
    spoil, message = DAMAGES[damage]
    spoil(state)
    with pytest.raises(UserError) as raised:
        converted(kind, tmp_path, state)
    assert message in str(raised.value) and "checkpoint.safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_gap_in_the_blocks_is_missing(tmp_path: Path) -> None:
    state = recorded("dit", "checkpoint/")
    with pytest.raises(UserError, match=r"missing: blocks\.1\.adaLN_modulation\.1\.bias, .*blocks\.1\.mlp"):
        converted("dit", tmp_path, {key: value for key, value in state.items() if "blocks.1." not in key})


def test_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of mdtv2: missing or misshapen: sideblocks"):
        converted("mdtv2", tmp_path, recorded("dit", "checkpoint/"))
    with pytest.raises(UserError, match=r"not a checkpoint of dit: unexpected: de_blocks.* and \d+ more"):
        converted("dit", tmp_path, recorded("mdtv2", "checkpoint/"))


def test_learned_positions_are_refused_for_dit(tmp_path: Path) -> None:
    state = recorded("dit", "checkpoint/")
    state["pos_embed"] = torch.randn(1, 16, 16)
    with pytest.raises(UserError, match="`pos_embed` is not the fixed sine-cosine table"):
        converted("dit", tmp_path, state)


@pytest.mark.parametrize(("heads", "message"), [(None, "width 16 is none of"), (3, "3 heads do not divide")])
def test_heads_that_nothing_tells_are_asked_for(heads: int | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    save_file(recorded("dit", "checkpoint/"), file)
    with pytest.raises(UserError, match=message):
        convert_checkpoint("dit", file, tmp_path / "model", heads)


class Surprise:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("surprise"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": Surprise()}, "checkpoint.pt", pickle_module=pickle)
    with pytest.raises(UserError, match="holds more than tensors"):
        convert_checkpoint("dit", Path("checkpoint.pt"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.safetensors"])
def test_files_that_are_no_checkpoints(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file"):
        convert_checkpoint("dit", tmp_path / name, tmp_path / "model")
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=f"{name}: (damaged|not a readable checkpoint)"):
        convert_checkpoint("dit", tmp_path / name, tmp_path / "model")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"ema": 1}])
def test_files_without_a_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        convert_checkpoint("mdtv2", tmp_path / "checkpoint.pt", tmp_path / "model")


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model"
    output.mkdir()
    with pytest.raises(UserError, match="exists already"):
        converted("mdtv2", tmp_path, recorded("mdtv2", "checkpoint/"))
    assert not any(output.iterdir())
    output.rmdir()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MDTv2Transformer2DModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted("mdtv2", tmp_path, recorded("mdtv2", "checkpoint/"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
