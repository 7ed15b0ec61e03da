"""Made-up attention records, and the loss as docs/method.md section 6 states it, in float64 with whole maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.losses import SHDConfig, SHDLoss
from shd_diffusion.squeezing import squeeze_heads


def shd(seed: int = 0, **options: Any) -> SHDLoss:
    """The loss with these options of its section; a plan may be made of tuples."""
    if isinstance(plan := options.get("pairing"), tuple):
        options["pairing"] = [[list(group) for group in level] for level in plan]
    return SHDLoss(SHDConfig(**options), seed)


def record(
    name: str = "block",
    samples: int = 2,
    heads: int = 4,
    queries: int = 9,
    keys: int | None = None,
    width: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    learns: bool = False,
    mask: Tensor | None = None,
    kind: str = "self",
) -> AttentionRecord:
    generator = torch.Generator().manual_seed(seed)

    def tensor(tokens: int) -> Tensor:
        made = torch.randn(samples, heads, tokens, width, generator=generator, dtype=torch.float64)
        return made.to(dtype).requires_grad_(learns)

    keys = queries if keys is None else keys
    weight = torch.randn(11, heads * width, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionRecord(name, kind, tensor(queries), tensor(keys), tensor(keys), weight, width**-0.5, mask)


def pair(teacher_heads: int = 5, student_heads: int = 2, blocks: int = 2, **options):
    """Records of a teacher with twice the blocks of a student, by name."""
    teacher = {
        f"t{i}": record(f"t{i}", heads=teacher_heads, seed=10 + i, **options) for i in range(2 * blocks)
    }
    student = {
        f"s{i}": record(f"s{i}", heads=student_heads, seed=50 + i, learns=True, **options)
        for i in range(blocks)
    }
    return teacher, student


def softmax(record: AttentionRecord, temperature: float) -> Tensor:
    logits = record.query.double() @ record.key.double().mT * record.scale
    if record.mask is not None:
        logits = logits + record.mask.double()
    return (logits / temperature).softmax(-1)


def squeezed(teacher: AttentionRecord, heads: int, temperature: float = 1.0, **strategy) -> Tensor:
    """The softened maps mixed by the weights of the unsoftened ones."""
    maps, softened = softmax(teacher, 1.0), softmax(teacher, temperature)
    _, details = squeeze_heads(
        maps, teacher.value.double(), teacher.output_weight.double(), heads, return_details=True, **strategy
    )
    weights = (
        details.weights
        if details.weights.ndim == 4
        else details.weights[..., None].expand(-1, -1, -1, maps.shape[2])
    )
    return torch.einsum("bnmq,bmqk->bnqk", weights, softened)


def literal_divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Divergence of each row, from its definition."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)

    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jensen_shannon":
            return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
        case "skewed_kl":
            return kl(p, 0.1 * p + 0.9 * q)
        case "mse":
            return ((p - q) ** 2).mean(-1)
        case "adaptive_kl":
            with torch.no_grad():
                share = torch.empty(p.shape[:-1], dtype=p.dtype)
                for row in torch.cartesian_prod(*map(torch.arange, p.shape[:-1])).tolist():
                    order = p[tuple(row)].argsort(descending=True).tolist()
                    mass, gaps = 0.0, [0.0, 0.0]
                    for key in order:
                        gaps[mass >= 0.5] += abs(p[(*row, key)] - q[(*row, key)]).item()
                        mass += p[(*row, key)].item()
                    share[tuple(row)] = gaps[0] / sum(gaps)
            return share * kl(p, q) + (1 - share) * kl(q, p)
    raise AssertionError(name)
