"""Masked training: which terms there are, what both models are shown, and runs through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, command, sets
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel, draw_ids_keep
from shd_diffusion.training.draws import draw
from shd_diffusion.training.masking import WithMasking, prepare_masking
from shd_diffusion.training.methods import Batch

CONFIGS = ROOT / "configs" / "digits"
SHORT = ["train.max_steps=2", "train.batch_size=8", "train.log_every=1", "train.checkpoint_every=2"]
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "sample_size": 8,
    "patch_size": 2,
}


def mdtv2(**arguments: Any) -> MDTv2Transformer2DModel:
    sizes = SIZES | {"num_layers": 2, "num_decoder_layers": 0, "num_embeds_ada_norm": 10}
    return MDTv2Transformer2DModel(**sizes | arguments)


class Recorder:
    """A method that notes the masks it is called with."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        self.seen.append(batch.ids_keep)
        return {"denoise": torch.tensor(float(len(self.seen)))}

    def weights(self, step: int) -> dict[str, float]:
        return {"denoise": 0.5 + step}

    def parameters(self) -> list[nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Tensor]:
        return {"kept": torch.ones(1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.loaded = state


def test_every_batch_is_seen_whole_and_masked_with_the_same_weight() -> None:
    recorder, kept = Recorder(), draw_ids_keep(2, 16, 0.3)
    method = WithMasking(recorder)
    part = torch.zeros(2, 1, 8, 8)
    batch = Batch(part, part, part, torch.zeros(2), torch.zeros(2), torch.zeros(2), kept)
    terms = method(nn.Identity(), batch, 3)
    assert {name: float(term) for name, term in terms.items()} == {"denoise": 1.0, "denoise_masked": 2.0}
    assert recorder.seen[0] is None and recorder.seen[1] is kept
    assert method.weights(3) == {"denoise": 3.5, "denoise_masked": 3.5}
    method.load_state_dict(method.state_dict())
    assert set(recorder.loaded) == {"kept"}


def test_masks_change_no_other_draw_and_are_shared_out_by_sample() -> None:
    plain = draw(0, 5, 6, (1, 8, 8), 1000, 0.1, latent_noise=True)
    masked = draw(0, 5, 6, (1, 8, 8), 1000, 0.1, latent_noise=True, masking=(16, 0.3))
    for name in ("noise", "timesteps", "dropped", "flipped", "latent_noise"):
        assert torch.equal(getattr(plain, name), getattr(masked, name))
    assert plain.ids_keep is None and masked.ids_keep is not None
    assert masked.ids_keep.shape[0] == 6 and 8 <= masked.ids_keep.shape[1] <= 11
    share = masked.take(slice(2, 4), torch.device("cpu"))
    assert share.ids_keep is not None and torch.equal(share.ids_keep, masked.ids_keep[2:4])


def test_without_masking_what_only_it_trains_is_frozen() -> None:
    model = mdtv2()
    prepare_masking(model, None, 0.0)
    model(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2])).sample.sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not model.mask_token.requires_grad and not next(model.side_block.parameters()).requires_grad
    masked = mdtv2()
    prepare_masking(masked, None, 0.3)
    assert all(parameter.requires_grad for parameter in masked.parameters())


def test_models_that_cannot_share_a_mask_are_named() -> None:
    dit = DiTTransformer2DModel(num_layers=1, out_channels=1, num_embeds_ada_norm=10, **SIZES)
    with pytest.raises(ValueError, match="DiTTransformer2DModel takes no token mask"):
        prepare_masking(mdtv2(), dit, 0.3)
    with pytest.raises(ValueError, match="16 tokens of the student and 4 of the teacher"):
        prepare_masking(mdtv2(), mdtv2(patch_size=4), 0.3)
    with pytest.raises(ValueError, match=r"mask_ratio 0\.79"):
        prepare_masking(mdtv2(patch_size=4), None, 0.79)


@pytest.mark.parametrize("layer_map", ["uniform", "[3, 7, 8, 9]"])
def test_a_deeper_mdtv2_teaches_a_shallower_one_masked(tmp_path: Path, layer_map: str) -> None:
    """Encoders of 8 and 2 blocks, as XL and S differ: in every stage the student learns from the same stage."""
    deep = ["model.arguments.num_layers=10", "model.arguments.num_attention_heads=4", *SHORT]
    code, _, errors = command(
        "train-teacher", CONFIGS / "mdtv2-teacher.yaml", "--output", tmp_path / "teacher", *sets(*deep)
    )
    assert code == 0, errors
    pairing = [
        "losses.shd.pairing=matched",
        "losses.shd.calibration_batches=1",
        "student.arguments.num_attention_heads=3",
    ]
    code, _, errors = command(
        "distill", CONFIGS / "mdtv2-distill.yaml", "--output", tmp_path / "student",
        *sets(*SHORT, *pairing, f"losses.shd.layer_map={layer_map}", f"teacher.path={tmp_path / 'teacher'}"),
    )  # fmt: skip
    assert code == 0, errors
    entry = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(entry["terms"]) == {
        name + suffix for name in ("denoise", "output", "shd") for suffix in ("", "_masked")
    }
    assert entry["terms"]["shd"]["value"] != entry["terms"]["shd_masked"]["value"]
    divergence = entry["divergence"]  # of the passes over all tokens
    assert sum(divergence.values()) / len(divergence) == pytest.approx(entry["terms"]["shd"]["value"])
    with safe_open(tmp_path / "student" / "attention.safetensors", "pt") as file:
        blocks = json.loads(file.metadata()["description"])["blocks"]
    assert [block["teacher"] for block in blocks] == [
        "in_blocks.3.attn", "out_blocks.3.attn", "decoder_blocks.0.attn", "decoder_blocks.1.attn"
    ]  # fmt: skip
    plans = json.loads((tmp_path / "student" / "merge_plans.json").read_text())
    assert set(plans) == {
        "in_blocks.0.attn", "out_blocks.0.attn", "decoder_blocks.0.attn", "decoder_blocks.1.attn"
    }  # fmt: skip


def test_masking_a_dit_is_refused(tmp_path: Path) -> None:
    options = sets(*SHORT, "train.mask_ratio=0.3")
    code, _, errors = command(
        "train-teacher", CONFIGS / "teacher.yaml", "--output", tmp_path / "run", *options
    )
    assert code == 2 and "train.mask_ratio" in errors and "takes no token mask" in errors
    assert not (tmp_path / "run").exists()
