"""Note what an attention kernel is called with, whichever kernel it is, on the way to it.

diffusers reaches a kernel by three doors: `F.scaled_dot_product_attention`; `dispatch_attention_fn`, which
picks a backend of its registry (flash, sage, flex, xformers, or SDPA again); and, in the XFormers processors,
`xformers.ops.memory_efficient_attention`. Each is watched only while one attention module runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# What is noted: how to read the arguments, and the arguments; nothing is computed before a record is wanted.
Note = tuple[Callable[..., "KernelCall"], tuple[Any, ...], dict[str, Any]]
Sink = Callable[[Note], None]

SDPA_BACKENDS = {
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_FLASH,
    AttentionBackendName._NATIVE_MATH,
}
# diffusers adds -10000 or less (float16's -65504, float32's smallest) to keys not to be seen
UNSEEN = -9000.0
MASKED = -1e30  # finite, so that 0 · log q stays 0 in a divergence; no float32 softmax tells it from -inf


@dataclass(frozen=True, slots=True)
class KernelCall:
    """Arguments of one attention kernel: query (B, H, Q, d), key and value (B, H, K, d).

    The mask is added, (B or 1, H or 1, Q or 1, K).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float


def watch(module: nn.Module, sink: Sink) -> AbstractContextManager[object]:
    """Context in which the kernel calls of an attention module reach `sink` before the kernel runs."""
    processor: Any = getattr(module, "processor", None)
    if type(processor).__name__.startswith("XFormers"):
        return _xformers_watched(module, sink)
    if hasattr(processor, "_attention_backend"):
        backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        if backend not in SDPA_BACKENDS:
            return _backend_watched(AttentionBackendName(backend), sink)
    return _SDPAWatched(sink)


class _SDPAWatched(TorchFunctionMode):
    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.sink((_read_sdpa, args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _backend_watched(name: AttentionBackendName, sink: Sink) -> Iterator[None]:
    kernel = _AttentionBackendRegistry._backends[name]

    def noting(*args: Any, **kwargs: Any) -> Any:
        sink((_read_backend, args, kwargs))
        return kernel(*args, **kwargs)

    _AttentionBackendRegistry._backends[name] = noting
    try:
        yield
    finally:
        _AttentionBackendRegistry._backends[name] = kernel


@contextmanager
def _xformers_watched(module: nn.Module, sink: Sink) -> Iterator[None]:
    ops = attention_processor.xformers.ops
    kernel = ops.memory_efficient_attention

    def noting(*args: Any, **kwargs: Any) -> Any:
        sink((_read_xformers, (module.heads, *args), kwargs))
        return kernel(*args, **kwargs)

    ops.memory_efficient_attention = noting
    try:
        yield
    finally:
        ops.memory_efficient_attention = kernel


# --- reading the arguments ----------------------------------------------------------------------------------


def _read_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> KernelCall:
    """torch's own layout, (B, H, N, d); `enable_gqa` shares each key head among neighbouring query heads."""
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = _additive(attn_mask)
    return KernelCall(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


def _additive(mask: Tensor) -> Tensor:
    """Four dimensions, and one finite number at every key that is not to be seen."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, MASKED)
    else:
        mask = mask.to(torch.promote_types(mask.dtype, torch.float32)).masked_fill(mask <= UNSEEN, MASKED)
    return mask[(None,) * (4 - mask.ndim)]


def counted_rows(call: KernelCall, among_themselves: bool) -> Tensor | None:
    """Which query rows are of tokens that count, (B, Q); None where the mask hides none.

    A row that may see no key is of padding. So is one whose own key is hidden, where tokens attend among themselves: no
    other token sees it.

    Args:
        call: of the kernel.
        among_themselves: whether query row i and key i are of the same token.
    """
    mask = call.mask
    if mask is None or mask.requires_grad:  # what is learned is a bias
        return None
    seen = (mask > MASKED).any(1)  # (B or 1, Q or 1, K): by any head
    counted = seen.any(2)
    if among_themselves and call.query.shape[2] == call.key.shape[2]:
        counted = counted & (seen[:, 0] if seen.shape[1] == 1 else seen.diagonal(dim1=1, dim2=2))
    return counted.expand(len(call.query), call.query.shape[2])


def stack(calls: Sequence[KernelCall], rows: int) -> KernelCall:
    """One call of all samples out of one each, whose texts differ in length: keys are padded and masked.

    Only the first `rows` query rows, the image's, are kept where the text's differ in number.
    """
    keys = max(call.key.shape[2] for call in calls)
    if len({call.query.shape[2] for call in calls}) == 1:
        rows = calls[0].query.shape[2]
    query = torch.cat([call.query[:, :, :rows] for call in calls])
    key, value = (
        torch.cat([pad(tensor, (0, 0, 0, keys - tensor.shape[2])) for tensor in tensors])
        for tensors in ([call.key for call in calls], [call.value for call in calls])
    )
    lengths = torch.tensor([call.key.shape[2] for call in calls], device=key.device)
    seen = torch.arange(keys, device=key.device) < lengths[:, None, None, None]  # (B, 1, 1, K)
    return KernelCall(query, key, value, _additive(seen), calls[0].scale)


def _read_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> KernelCall:
    """The registry's layout, (B, N, H, d), and masks of (B, K) or flex attention's BlockMask as well."""
    if isinstance(attn_mask, BlockMask):
        batch, heads = attn_mask.shape[:2]
        attn_mask = create_mask(
            attn_mask.mask_mod, batch, heads, query.shape[1], key.shape[1], device=str(query.device)
        )
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise RuntimeError(
            f"a {type(attn_mask).__name__} cannot be read as a mask; use a backend that takes tensors"
        )
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _read_sdpa(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)


def _read_xformers(
    heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> KernelCall:
    """Heads folded into the batch, (B·H, N, d), as diffusers' XFormers processors call it."""
    query, key, value = (x.unflatten(0, (-1, heads)) for x in (query, key, value))
    mask = None if attn_bias is None else attn_bias.unflatten(0, (-1, heads))
    return _read_sdpa(query, key, value, mask, scale=scale)
