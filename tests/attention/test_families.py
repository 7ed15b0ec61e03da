"""What must hold for every family: the capture changes nothing and explains what a block computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, output
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture, AttentionRecord, attention_blocks

ALL = list(FAMILIES)
SHARED_KEYS = {"lumina2": {2}, "lumina-next": {1}, "krea2": {1, 2}, "cosmos3": {1}, "ace-step": {2}}
GATED = {"krea2", "lumina-next"}  # what heads attended to is multiplied by a gate before it is projected
TEXT_FIRST = {"cogview4", "easyanimate"}
FUSING = [
    "unet2d-condition",
    "pixart",
    "hunyuan-dit",
    "sd3",
    "auraflow",
    "flux",
    "flux2",
    "wan",
    "wan image-to-video",
]


def capture(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, AttentionRecord]]:
    with AttentionCapture(model) as capture:
        return output(model(**inputs)), capture.records


@pytest.mark.parametrize("name", ALL)
def test_the_model_computes_the_same_and_is_left_as_it_was(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    expected = output(model(**family.draw()))
    actual, _ = capture(model, family.draw())
    assert torch.equal(actual, expected) and expected.abs().sum() > 0
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before
    assert torch.equal(output(model(**family.draw())), expected)


@pytest.mark.parametrize("name", ALL)
def test_every_block_leaves_its_records_in_order(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    ran: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    _, records = capture(model, family.draw())
    assert tuple((record.name, record.kind) for record in records.values()) == family.records
    blocks = [path for path in records if ":" not in path]
    if name == "lumina2":  # it refines the text before the image, and neither depends on the other
        blocks[:2] = blocks[1::-1]
    assert blocks == [path for path in ran if path in records]


@pytest.mark.parametrize("name", ALL)
def test_the_listing_agrees_with_the_records(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    listed = attention_blocks(model)
    _, records = capture(model, family.draw())
    skipped = {"side_block.attn"} if name == "mdtv2" else set()
    assert {path for path, block in listed.items() if block.capturable} - skipped == {
        path.partition(":")[0] for path in records
    }
    for path, record in records.items():
        block = listed[path.partition(":")[0]]
        assert (block.kind, block.heads, block.head_dim) == (
            record.kind,
            record.heads,
            record.query.shape[-1],
        )
        assert record.output_weight.shape[1] == block.heads * block.head_dim
        assert block.key_value_heads in SHARED_KEYS.get(name, {block.heads})


@pytest.mark.parametrize("name", [name for name in ALL if name not in GATED])
def test_heads_add_up_to_the_output_of_the_block(name: str) -> None:
    """sum_h A_h X_h + bias is what the output projection returned, read off the projection itself."""
    family = FAMILIES[name]
    model = family.build()
    seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: seen.update({module: (args[0], out)}))
    with torch.no_grad():
        _, records = capture(model, family.draw())

    for path, record in records.items():
        projection = _projection(model, record)
        given, returned = seen[projection]
        width = record.output_weight.shape[1]
        rest = torch.cat([torch.zeros_like(given[..., :width]), given[..., width:]], dim=-1)
        expected = returned - F.linear(
            rest, projection.weight, projection.bias
        )  # less the bias, and less an MLP that is projected along
        contributions = record.value @ _by_head(record)  # X_h = V_h W_h
        actual = (record.maps() @ contributions).sum(dim=1)
        if path.endswith(":image"):
            continue
        if f"{path}:image" in records:  # one projection of the sum of both passes
            image = records[f"{path}:image"]
            actual = actual + (image.maps() @ (image.value @ _by_head(image))).sum(dim=1)
        expected = expected.reshape(actual.shape[0], -1, actual.shape[2])  # Cosmos3 has no batch
        if (rest := expected.shape[1] - actual.shape[1]) > 0:  # one projection of both streams
            first = path.endswith(":context") == (name in TEXT_FIRST)
            expected = expected[:, :-rest] if first else expected[:, rest:]
        if record.mask is not None:  # rows without any key are nothing's output: kernels make them 0
            alive = (record.mask > -1e29).any(dim=-1).any(dim=1).expand(actual.shape[:2])
            actual, expected = actual[alive], expected[alive]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().mean() > 1e-3


def _projection(model: nn.Module, record: AttentionRecord) -> nn.Linear:
    """The module whose weight the record names, itself or a view of it."""
    weight = record.output_weight if record.output_weight._base is None else record.output_weight._base
    return next(m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is weight)


def _by_head(record: AttentionRecord) -> Tensor:
    """W_h of every head: (H, d, C)."""
    return record.output_weight.T.unflatten(0, (record.heads, -1))


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_the_maps_reach_the_model(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    _, records = capture(model, family.draw())
    for path, record in records.items():
        record.query.retain_grad()
        record.key.retain_grad()
        loss = record.maps().square().sum()
        loss.backward(retain_graph=True)
        assert record.query.grad.abs().sum() > 0 and record.key.grad.abs().sum() > 0, path
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", FUSING)
def test_fused_projections_leave_the_same_records(name: str) -> None:
    family = FAMILIES[name]
    if name == "sd3":  # diffusers' fused processor leaves out the norms and fails in image-only attention
        family = replace(family, arguments={**family.arguments, "dual_attention_layers": (), "qk_norm": None})
    model = family.build()
    _, separate = capture(model, family.draw())
    model.fuse_qkv_projections()
    _, fused = capture(model, family.draw())
    assert any(hasattr(m, "to_qkv") or hasattr(m, "to_kv") or name == "flux2" for m in model.modules())
    assert list(fused) == list(separate)
    for path, record in fused.items():
        torch.testing.assert_close(record.maps(), separate[path].maps(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["dit", "unet2d-condition", "pixart", "sd3", "flux", "qwen-image", "wan", "mdtv2"]
)
def test_checkpointing_leaves_gradients_as_they_are(name: str) -> None:
    family = FAMILIES[name]

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = family.build().train()
        for module in model.modules():
            if hasattr(module, "dropout_prob"):  # of labels
                module.dropout_prob = 0.0
        if checkpointing:
            model.enable_gradient_checkpointing()
        with AttentionCapture(model) as capture:
            prediction = output(model(**family.draw()))
            records = capture.records
            loss = prediction.square().mean() + sum(r.maps().square().sum() for r in records.values())
            loss.backward()
            again = capture.records
        assert all(again[path].key is record.key for path, record in records.items())
        return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for path, gradient in plain.items():
        assert torch.equal(checkpointed[path], gradient), path
