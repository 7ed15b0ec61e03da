"""What one attention block attended to in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shd_diffusion.attention.kernels import MASKED

Kind = Literal["self", "cross", "joint"]
Index: TypeAlias = Tensor | slice


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """Queries, keys and values as the attention kernel received them, and the output weight behind it.

    B samples, H heads of width d, Q queries, K keys. Rotary embeddings, normalised queries and keys, and
    repeated groups of keys are already applied, so `maps() @ value` is the kernel's own output, but for rows that may
    see no key: there a kernel puts out zeros or what it likes, and the maps are uniform. Such rows do not count.

    Attributes:
        name: module path inside the model, e.g. `transformer_blocks.3.attn1`.
        kind: `self`, `cross`, or `joint` (one stream of queries over the keys of two streams).
        query: (B, H, Q, d); keeps its graph, so that a loss on the maps reaches the student's projections.
        key: (B, H, K, d).
        value: (B, H, K, d).
        output_weight: (C, H·d), as in `nn.Linear.weight` of the output projection.
        scale: factor on the logits, usually d ** -0.5.
        mask: added to the logits, (B or 1, H or 1, Q or 1, K); None where there is none. A key that a query must
            not see has `MASKED` or less.
        counted: which query rows count, (B, Q); None where all do. Rows of padding do not: text that shares a batch
            with a longer prompt has them, where its tokens attend too.
        own_keys: of joint attention, the keys of the tokens that the query rows are of; None for other attention.
    """

    name: str
    kind: Kind
    query: Tensor
    key: Tensor
    value: Tensor
    output_weight: Tensor
    scale: float
    mask: Tensor | None = None
    counted: Tensor | None = None
    own_keys: slice | None = None

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def other_keys(self) -> slice | None:
        """Of joint attention, the keys of the tokens that the query rows are not of; None for other attention."""
        if (own := self.own_keys) is None:
            return None
        return slice(own.stop, self.key.shape[2]) if own.start == 0 else slice(0, own.start)

    def of_samples(self, samples: slice) -> AttentionRecord:
        """The record of some samples, on the same memory."""
        return replace(
            self,
            query=self.query[samples],
            key=self.key[samples],
            value=self.value[samples],
            mask=taken(self.mask, samples),
            counted=self.some_counted(samples),
        )

    def detached(self) -> AttentionRecord:
        """The record without the graph that leads to it."""
        parts = {name: getattr(self, name).detach() for name in ("query", "key", "value", "output_weight")}
        return replace(self, **parts, mask=None if self.mask is None else self.mask.detach())

    def to(self, device: torch.device) -> AttentionRecord:
        """The record on another device; the output weight stays with its model, since it is not read each step."""
        if self.query.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("query", "key", "value")}
        mask = None if self.mask is None else self.mask.to(device)
        return replace(
            self, **moved, mask=mask, counted=None if self.counted is None else self.counted.to(device)
        )

    def some_counted(self, samples: Index | None = None, rows: Index | None = None) -> Tensor | None:
        """`counted` of some samples and query rows."""
        return None if self.counted is None else _at(_at(self.counted, 0, samples), 1, rows)

    def logits(
        self, temperature: float = 1.0, samples: Index | None = None, rows: Index | None = None
    ) -> Tensor:
        """Logits before the softmax, divided by the temperature: (samples, H, rows, K), float32 or better.

        Args:
            temperature: τ > 0; above 1 softens the maps (docs/method.md section 6).
            samples: indices or slice of the samples that are wanted; None for all.
            rows: indices or slice of the query rows that are wanted; None for all.
        """
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query = _at(_at(self.query, 0, samples), 2, rows).to(dtype)
        key = _at(self.key, 0, samples).to(dtype)
        logits = (query * (self.scale / temperature)) @ key.mT  # (samples, H, rows, d) @ (samples, H, d, K)
        mask = taken(self.mask, samples, rows)
        return logits if mask is None else logits + mask.to(dtype) / temperature

    def comparable_logits(
        self, temperature: float = 1.0, samples: Index | None = None, rows: Index | None = None
    ) -> Tensor:
        """As `logits`; rows that do not count attend to the first key alone, in every head of every model.

        So they differ nowhere: no coefficient and no divergence has anything from them.
        """
        logits = self.logits(temperature, samples, rows)
        counted = self.some_counted(samples, rows)
        if counted is None:
            return logits
        first = torch.full_like(logits[0, 0, 0], MASKED)
        first[0] = 0
        return torch.where(counted[:, None, :, None], logits, first)

    def maps(
        self, temperature: float = 1.0, samples: Index | None = None, rows: Index | None = None
    ) -> Tensor:
        """Attention maps softmax(logits / τ): (samples, H, rows, K); each row is a distribution over the keys."""
        return self.logits(temperature, samples, rows).softmax(dim=-1)


def taken(mask: Tensor | None, samples: Index | None = None, rows: Index | None = None) -> Tensor | None:
    """A mask (B or 1, H or 1, Q or 1, K) for some samples and query rows; what is the same for all stays."""
    if mask is None:
        return None
    mask = mask if mask.shape[0] == 1 else _at(mask, 0, samples)
    return mask if mask.shape[2] == 1 else _at(mask, 2, rows)


def _at(tensor: Tensor, dim: int, index: Index | None) -> Tensor:
    return tensor if index is None else tensor[(slice(None),) * dim + (index,)]
