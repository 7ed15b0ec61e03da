"""MDTv2: sizes, masking, attention, saving. Parity with the authors' code is in test_convert.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from shd_diffusion.attention import AttentionCapture, attention_blocks
from shd_diffusion.models.mdtv2 import (
    MDTV2_SIZES,
    MDTv2Transformer2DModel,
    RelativePositionBias,
    num_kept_tokens,
)

TOKENS = 16
ROUNDING = 1e-4  # of float32 sums in another order, through six random blocks; what differs does so by 1e-2


def tiny(heads: int = 2, **arguments: int) -> MDTv2Transformer2DModel:
    """Every parameter random: a new model outputs zeros."""
    torch.manual_seed(heads)
    sizes = {"num_layers": 6, "num_decoder_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 5} | arguments
    model = MDTv2Transformer2DModel(num_attention_heads=heads, attention_head_dim=8, in_channels=3, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(4, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([0, 10, 500, 999]),
        "class_labels": torch.tensor([0, 4, 5, 2]),
    }


@pytest.fixture
def ids_keep() -> Tensor:
    order = torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return order[:, :9]


# The figures of sail-sg/MDT, counted on its own classes with learned variance and 1000 classes.
@pytest.mark.parametrize(
    ("size", "count"), [("S/2", 38_454_872), ("B/2", 152_112_272), ("XL/2", 742_263_904)]
)
def test_parameter_counts_are_the_authors(size: str, count: int) -> None:
    with torch.device("meta"):
        model = MDTv2Transformer2DModel(out_channels=8, **MDTV2_SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_new_model_outputs_zero(inputs: dict[str, Tensor]) -> None:
    model = MDTv2Transformer2DModel(2, 8, 3, num_layers=6, num_decoder_layers=2, sample_size=8)
    assert torch.equal(model(**inputs).sample, torch.zeros(4, 3, 8, 8))


def test_keeping_every_token_is_no_masking(inputs: dict[str, Tensor]) -> None:
    model = tiny()
    order = torch.stack([torch.randperm(TOKENS) for _ in range(4)])
    assert torch.allclose(model(**inputs, ids_keep=order).sample, model(**inputs).sample, atol=ROUNDING)


def test_order_of_kept_tokens_does_not_matter(inputs: dict[str, Tensor], ids_keep: Tensor) -> None:
    model = tiny()
    masked = model(**inputs, ids_keep=ids_keep).sample
    assert torch.allclose(model(**inputs, ids_keep=ids_keep.flip(1)).sample, masked, atol=ROUNDING)
    assert not torch.allclose(model(**inputs).sample, masked, atol=1e-2)


def test_encoder_sees_kept_tokens_alone(inputs: dict[str, Tensor], ids_keep: Tensor) -> None:
    model = tiny(num_decoder_layers=0)  # decoder blocks have a skip from all patches
    changed = inputs["hidden_states"].clone()
    for sample, kept in enumerate(ids_keep.tolist()):
        for token in set(range(TOKENS)) - set(kept):
            row, column = 2 * (token // 4), 2 * (token % 4)
            changed[sample, :, row : row + 2, column : column + 2] += 1
    assert not torch.equal(changed, inputs["hidden_states"])
    masked = model(**inputs, ids_keep=ids_keep).sample
    assert torch.equal(model(**inputs | {"hidden_states": changed}, ids_keep=ids_keep).sample, masked)


def test_how_many_tokens_a_masked_step_keeps() -> None:
    counts = [num_kept_tokens(256, 0.3, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert counts == [num_kept_tokens(256, 0.3, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert min(counts) >= int(256 * 0.5) and max(counts) <= int(256 * 0.7)
    assert len(set(counts)) > 20
    with pytest.raises(ValueError, match=r"mask_ratio 0\.8"):
        num_kept_tokens(256, 0.8, torch.Generator())


def test_labels_are_not_dropped_inside(inputs: dict[str, Tensor]) -> None:
    model = tiny()
    assert torch.equal(model.train()(**inputs).sample, model.eval()(**inputs).sample)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_changes_nothing(
    masked: bool, inputs: dict[str, Tensor], ids_keep: Tensor
) -> None:
    model = tiny().train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, ids_keep=ids_keep if masked else None).sample.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert ("mask_token" in plain) == masked


def test_relative_position_bias_is_by_offset() -> None:
    bias = RelativePositionBias(grid=3, heads=2)
    torch.nn.init.normal_(bias.table)
    expected = torch.empty(2, 9, 9)
    for query in range(9):
        for key in range(9):
            rows, columns = query // 3 - key // 3, query % 3 - key % 3
            expected[:, query, key] = bias.table[(rows + 2) * 5 + columns + 2].detach()
    assert torch.equal(bias()[0], expected)
    ids = torch.tensor([[4, 0, 7], [8, 1, 2]])
    kept = torch.stack([expected[:, row][:, :, row] for row in ids])
    assert torch.equal(bias(ids), kept)


@pytest.mark.parametrize("masked", [False, True])
def test_capture_records_what_is_computed(masked: bool, inputs: dict[str, Tensor], ids_keep: Tensor) -> None:
    model, mask = tiny(), ids_keep if masked else None
    blocks = [name for name in attention_blocks(model) if masked or not name.startswith("side_block")]
    plain, outputs = model(**inputs, ids_keep=mask).sample, {}
    for name in blocks:
        attention = model.get_submodule(name)
        attention.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    with AttentionCapture(model, blocks) as capture:
        assert torch.equal(model(**inputs, ids_keep=mask).sample, plain)
        records = dict(capture.records)
    assert list(records) == list(outputs) == blocks and len(blocks) == 6 + masked
    for name, record in records.items():
        mixed = (record.maps() @ record.value).transpose(1, 2).flatten(2) @ record.output_weight.T
        assert torch.allclose(mixed + model.get_submodule(name).to_out[0].bias, outputs[name], atol=ROUNDING)
        encoder = name.startswith(("in_blocks", "out_blocks"))
        tokens = ids_keep.shape[1] if masked and encoder else TOKENS
        assert record.mask is not None
        assert record.mask.shape == (4 if masked and encoder else 1, 2, tokens, tokens)  # no copy a sample


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("masked", [False, True])
def test_processors_of_diffusers_serve_too(
    processor: type, masked: bool, inputs: dict[str, Tensor], ids_keep: Tensor
) -> None:
    model, mask = tiny(), ids_keep if masked else None
    own = model(**inputs, ids_keep=mask).sample
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor())
    assert torch.allclose(model(**inputs, ids_keep=mask).sample, own, atol=ROUNDING)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, inputs: dict[str, Tensor], ids_keep: Tensor) -> None:
    model = tiny().eval()
    model.save_pretrained(tmp_path)
    loaded = MDTv2Transformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs, ids_keep=ids_keep).sample, model(**inputs, ids_keep=ids_keep).sample)
    (sample,) = loaded(**inputs, return_dict=False)
    assert torch.equal(sample, model(**inputs).sample)


def test_mixed_precision_runs(inputs: dict[str, Tensor], ids_keep: Tensor) -> None:
    model = tiny()
    full = model(**inputs, ids_keep=ids_keep).sample
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs, ids_keep=ids_keep).sample
    half.float().sum().backward()
    assert (half.float() - full).norm() < 0.05 * full.norm()


def test_bad_input_is_named(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="num_layers 7 less num_decoder_layers 2 is 5"):
        tiny(num_layers=7)
    with pytest.raises(ValueError, match="patch_size 2 does not divide sample_size 9"):
        tiny(sample_size=9)
    with pytest.raises(ValueError, match="10×10, this model is for 8×8"):
        tiny()(**inputs | {"hidden_states": torch.zeros(4, 3, 10, 10)})
