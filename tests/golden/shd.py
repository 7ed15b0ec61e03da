"""SHD's value and gradients on stored records, for a grid of its options.

`python tests/golden/shd.py` records them anew, from the repository's root with it on PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.losses.shd import SHDConfig, SHDLoss

FILE = Path(__file__).with_name("shd.safetensors")
Options = dict[str, object]
Tensors = dict[str, Tensor]

# Teacher's and student's heads, their tokens, their blocks, and the shape of the mask on all keys.
SETS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, ...] | None]] = {
    "4 to 2": ((4, 2), (6, 6), (4, 2), None),
    "5 to 2": ((5, 2), (6, 6), (2, 1), None),
    "12 to 5": ((12, 5), (6, 6), (1, 1), None),
    "grids": ((4, 2), (16, 4), (2, 1), None),
    "finer student": ((4, 2), (4, 16), (2, 1), None),
    "masked keys": ((5, 2), (6, 6), (2, 1), (2, 1, 1, 6)),
    "masked pairs": ((5, 2), (6, 6), (2, 1), (2, 1, 6, 6)),
}
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "adaptive_kl", "mse")
GRANULARITIES = ("sample", "row")
PLAN = (((0, 3), (1, 4), (2,)), ((0, 2), (1,)))  # of 5 heads to 2, unlike the adjacent one


def cases() -> list[tuple[str, Options]]:
    """Sets and the options that each is recorded with."""
    found: list[tuple[str, Options]] = []
    for granularity in GRANULARITIES:
        by: Options = {"granularity": granularity}
        for temperature in (1.0, 2.5):
            found += [("5 to 2", by | {"temperature": temperature, "divergence": d}) for d in DIVERGENCES]
            found += [(name, by | {"temperature": temperature}) for name in SETS if name != "5 to 2"]
        for merge in ("progressive", "joint"):
            for coefficient in ("closed_form", "mean", "select"):
                if merge == "joint" and coefficient == "select":
                    continue
                found.append(("12 to 5", by | {"merge": merge, "coefficient": coefficient}))
        found.append(("5 to 2", by | {"pairing": PLAN, "temperature": 2.5}))
        for name in ("4 to 2", "grids", "masked pairs"):
            found += [(name, by | {"rows": 0.5, "coefficient_rows": of}) for of in ("all", "sampled")]
    found.append(("4 to 2", {"layer_map": "last"}))
    return found


def draw() -> Tensors:
    """Queries, keys, values, output weights and masks, by set, side, block and name."""
    generator = torch.Generator().manual_seed(0)
    drawn: Tensors = {}
    for name, (heads, tokens, blocks, mask) in SETS.items():
        for side, *sizes in zip(("teacher", "student"), heads, tokens, blocks, strict=True):
            for block in range(sizes[2]):
                of_block = f"{name}/{side}/block{block}"
                for part in ("query", "key", "value"):
                    drawn[f"{of_block}/{part}"] = torch.randn(2, *sizes[:2], 4, generator=generator).double()
                drawn[f"{of_block}/output_weight"] = torch.randn(
                    7, 4 * sizes[0], generator=generator
                ).double()
        if mask is not None:
            kept = torch.rand(mask, generator=generator) < 0.7
            kept[..., 0] = True  # each row attends to something
            drawn[f"{name}/mask"] = torch.zeros(mask).double().masked_fill(~kept, -torch.inf)
    return drawn


def records(stored: Tensors, name: str, side: str) -> dict[str, AttentionRecord]:
    """The records of a set's side by block; the student's queries and keys learn."""
    found = {}
    for block in range(SETS[name][2][side == "student"]):
        parts = {
            part: stored[f"{name}/{side}/block{block}/{part}"].clone()
            for part in ("query", "key", "value", "output_weight")
        }
        if side == "student":
            parts |= {part: parts[part].requires_grad_() for part in ("query", "key")}
        found[f"block{block}"] = AttentionRecord(
            f"block{block}", "self", **parts, scale=0.5, mask=stored.get(f"{name}/mask")
        )
    return found


def shd(options: Options, teacher: dict[str, AttentionRecord], student: dict[str, AttentionRecord]) -> Tensor:
    """The loss: the one line here that knows how it is called."""
    plan = options.get("pairing")
    plain = {} if plan is None else {"pairing": [[list(group) for group in groups] for groups in PLAN]}
    return SHDLoss(SHDConfig.model_validate({**options, **plain}))(teacher, student)


def compute(stored: Tensors, name: str, options: Options) -> Tensors:
    """The loss of a case, and its gradients by the student's queries and keys."""
    teacher, student = records(stored, name, "teacher"), records(stored, name, "student")
    inputs = {
        f"{block}/{part}": getattr(record, part)
        for block, record in student.items()
        for part in ("query", "key")
    }
    loss = shd(options, teacher, student)
    return {"loss": loss.detach()} | dict(
        zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True)
    )


def key(name: str, options: Options) -> str:
    return ", ".join([name, *(f"{option} {value}" for option, value in options.items())])


def stored() -> Tensors:
    return load_file(FILE)


if __name__ == "__main__":
    inputs = draw()
    recorded = {
        f"{key(*case)}/{part}": value for case in cases() for part, value in compute(inputs, *case).items()
    }
    save_file(inputs | recorded, FILE)
