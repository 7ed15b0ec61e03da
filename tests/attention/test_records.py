"""Records against scaled_dot_product_attention itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture, AttentionRecord

SAMPLES, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 5, 7, 3


class Kernel(nn.Module):
    """An attention module that is nothing but one call of the kernel."""

    heads, inner_dim, processor = HEADS, HEADS * WIDTH, None

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Sequential(nn.Linear(HEADS * WIDTH, 6))

    def set_processor(self, processor: Any) -> None: ...

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(hidden_states, *args, **kwargs)


def record_of(*args: Any, **kwargs: Any) -> tuple[Tensor, AttentionRecord]:
    model = nn.Sequential(Kernel())
    with AttentionCapture(model) as capture:
        result = model[0](*args, **kwargs)
    return result, capture.records["0"]


def qkv(heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(SAMPLES, HEADS, QUERIES, WIDTH),
        torch.randn(SAMPLES, heads, KEYS, WIDTH),
        torch.randn(SAMPLES, heads, KEYS, WIDTH),
    )


KEPT = torch.rand(SAMPLES, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.7
CALLS: dict[str, tuple[int, tuple[Any, ...], dict[str, Any]]] = {
    "plain": (HEADS, (), {}),
    "scale": (HEADS, (), {"scale": 0.3}),
    "keys kept": (HEADS, (KEPT,), {}),
    "keys kept, for all rows": (HEADS, (), {"attn_mask": KEPT[:, :, :1]}),
    "two-dimensional mask": (HEADS, (), {"attn_mask": KEPT[0, 0]}),
    "bias": (
        HEADS,
        (),
        {"attn_mask": torch.linspace(-3, 3, HEADS * QUERIES * KEYS).view(1, HEADS, QUERIES, KEYS)},
    ),
    "causal": (HEADS, (), {"is_causal": True}),
    "grouped": (2, (), {"enable_gqa": True}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_maps_times_values_is_what_the_kernel_returned(
    call: tuple[int, tuple[Any, ...], dict[str, Any]],
) -> None:
    heads, args, kwargs = call
    result, record = record_of(*qkv(heads), *args, **kwargs)
    assert record.key.shape == record.value.shape == (SAMPLES, HEADS, KEYS, WIDTH)
    torch.testing.assert_close(record.maps() @ record.value, result)
    torch.testing.assert_close(record.maps().sum(dim=-1), torch.ones(SAMPLES, HEADS, QUERIES))


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([4, 0, 2])], ids=["slice", "indices"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_some_rows_are_the_same_rows_of_all(
    call: tuple[int, tuple[Any, ...], dict[str, Any]], rows: Any
) -> None:
    heads, args, kwargs = call
    _, record = record_of(*qkv(heads), *args, **kwargs)
    torch.testing.assert_close(record.maps(2.0, rows=rows), record.maps(2.0)[:, :, rows])


def test_temperature_divides_the_logits() -> None:
    query, key, value = qkv()
    _, record = record_of(query, key, value, KEPT)
    expected = torch.einsum("bhqd,bhkd->bhqk", query, key) / WIDTH**0.5 / 4
    torch.testing.assert_close(record.maps(4.0), expected.masked_fill(~KEPT, float("-inf")).softmax(-1))


def test_logits_of_masked_keys_are_finite_and_their_maps_exactly_zero() -> None:
    """So that 0 · log 0 in a divergence is 0 and not NaN, at high temperature too."""
    _, record = record_of(*qkv(), KEPT)
    assert record.logits().isfinite().all() and record.logits(100.0).log_softmax(-1).isfinite().all()
    assert (record.maps(100.0)[~KEPT.expand_as(record.maps())] == 0).all()


@pytest.mark.parametrize("low", [-10000.0, float("-inf"), torch.finfo(torch.float32).min])
def test_a_large_negative_mask_ends_as_a_bool_mask_does(low: float) -> None:
    _, expected = record_of(*qkv(), KEPT[0, 0])
    _, record = record_of(*qkv(), torch.zeros(QUERIES, KEYS).masked_fill(~KEPT[0, 0], low))
    assert record.mask is not None and record.mask.shape == (1, 1, QUERIES, KEYS)
    assert torch.equal(record.mask, expected.mask)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_of_some_samples_and_rows_are_those_of_all(temperature: float) -> None:
    query, key, value = (tensor.double() for tensor in qkv())
    _, record = record_of(query, key, value, KEPT)
    whole = record.logits(temperature)
    # float64: a product of fewer rows may be summed in another order
    torch.testing.assert_close(
        record.logits(temperature, slice(1, 2), slice(1, 4)), whole[1:2, :, 1:4], rtol=1e-12, atol=1e-12
    )


def test_rows_of_padding_do_not_count() -> None:
    """Rows that see no key; and where tokens attend among themselves, those that no other token sees."""
    query, key, value = (torch.randn(SAMPLES, HEADS, KEYS, WIDTH) for _ in range(3))
    kept = torch.arange(KEYS) < torch.tensor([4, KEYS])[:, None]
    _, of_keys = record_of(query, key, value, kept[:, None, None])
    _, of_pairs = record_of(query, key, value, kept[:, None, None] & kept[:, None, :, None])
    _, unmasked = record_of(query, key, value)
    _, biased = record_of(query, key, value, torch.linspace(-3, 3, KEYS)[None])
    assert unmasked.counted is None and biased.counted.all()
    for record in (of_keys, of_pairs):
        assert torch.equal(record.counted, kept)
        assert torch.equal(record.of_samples(slice(0, 1)).counted, kept[:1])
    _, crossed = record_of(*qkv(), torch.arange(KEYS)[None] < 4)
    assert crossed.counted.shape == (SAMPLES, QUERIES) and crossed.counted.all()


def test_a_detached_record_leads_to_nothing_that_learns() -> None:
    """Not even to a bias, as MDTv2's."""
    query, key, value = (each.requires_grad_() for each in qkv())
    bias = torch.zeros(1, HEADS, QUERIES, KEYS, requires_grad=True)
    _, record = record_of(query, key, value, bias)
    assert record.maps().requires_grad and not record.detached().maps().requires_grad
