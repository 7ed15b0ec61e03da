"""What one attention block attended to in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["self", "cross", "joint"]


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """Queries, keys and values as the attention kernel received them, and the output weight behind it.

    B samples, H heads of width d, Q queries, K keys. Rotary embeddings, normalised queries and keys, and
    repeated groups of keys are already applied, so `maps() @ value` is the kernel's own output.

    Attributes:
        name: module path inside the model, e.g. `transformer_blocks.3.attn1`.
        kind: `self`, `cross`, or `joint` (one stream of queries over the keys of two streams).
        query: (B, H, Q, d); keeps its graph, so that a loss on the maps reaches the student's projections.
        key: (B, H, K, d).
        value: (B, H, K, d).
        output_weight: (C, H·d), as in `nn.Linear.weight` of the output projection.
        scale: factor on the logits, usually d ** -0.5.
        mask: added to the logits, broadcastable to (B, H, Q, K); None where there is none.
    """

    name: str
    kind: Kind
    query: Tensor
    key: Tensor
    value: Tensor
    output_weight: Tensor
    scale: float
    mask: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    def of_samples(self, samples: slice) -> AttentionRecord:
        """The record of some samples, on the same memory."""
        mask = self.mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[samples]
        return replace(
            self, query=self.query[samples], key=self.key[samples], value=self.value[samples], mask=mask
        )

    def to(self, device: torch.device) -> AttentionRecord:
        """The record on another device; the output weight stays with its model, since it is not read each step."""
        if self.query.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("query", "key", "value")}
        return replace(self, **moved, mask=None if self.mask is None else self.mask.to(device))

    def logits(self, temperature: float = 1.0, rows: Tensor | slice | None = None) -> Tensor:
        """Logits before the softmax, divided by the temperature: (B, H, rows, K), float32 or better.

        Args:
            temperature: τ > 0; above 1 softens the maps (docs/method.md section 6).
            rows: indices or slice of the query rows that are wanted; None for all.
        """
        query = self.query if rows is None else self.query[:, :, rows]
        dtype = torch.promote_types(query.dtype, torch.float32)
        logits = (query.to(dtype) * self.scale) @ self.key.to(dtype).transpose(-1, -2)
        if self.mask is not None:
            logits = logits + (self.mask if rows is None else mask_rows(self.mask, rows))
        return logits if temperature == 1.0 else logits / temperature

    def maps(self, temperature: float = 1.0, rows: Tensor | slice | None = None) -> Tensor:
        """Attention maps softmax(logits / τ): (B, H, rows, K); each row is a distribution over the keys."""
        return self.logits(temperature, rows).softmax(dim=-1)


def mask_rows(mask: Tensor, rows: Tensor | slice) -> Tensor:
    """The mask of some query rows; one that is the same for all rows stays as it is."""
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
