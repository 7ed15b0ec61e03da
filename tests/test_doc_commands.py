"""What README and docs tell to type: commands take it, files are there, Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from diffusers import ModelMixin
from small_models import small_dit
from torch import Tensor
from typer.main import get_command

from shd_diffusion.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def typed(page: Path) -> list[list[str]]:
    """The words of each line to be typed: of the blocks, and of what stands within the text. No redirections."""
    text = page.read_text("utf-8")
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += [
        " ".join(line.split())
        for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
        if re.match(r"(shd-diffusion|make|python|accelerate|torchrun) ", line)
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[: line.index(">")] if ">" in line else line for line in words if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_typed_is_there(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for line in typed(page):
        match line:
            case ["shd-diffusion", *words]:
                check_command(words)
            case ["make", target]:
                assert target in targets, line
        for word in line:
            if re.fullmatch(r"(configs|pipelines|eval)/.+\.(ya?ml|py)", word) and "NAME" not in word:
                assert (ROOT / word).is_file(), line


def check_command(words: list[str]) -> None:
    """See that the command line takes it; one word is the name of a command. Nothing is run."""
    group: Any = get_command(app)
    if words[0].startswith("-") or words[0].isupper():
        return
    assert words[0] in group.commands, words
    if len(words) > 1:
        group.commands[words[0]].make_context(words[0], words[1:])


def test_the_table_of_commands_is_taken() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
    told = [command.split() for row in rows for command in re.findall(r"`([^`]+)`", row)]
    assert {"inspect", "distill", "sample", "report"} < {words[0] for words in told}
    for words in told:
        check_command(words)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1000


def test_the_loop_of_the_readme_trains_a_student() -> None:
    def denoising_loss(prediction: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (prediction - batch["hidden_states"]).square().mean()

    teacher, student = lively(small_dit(4)), lively(small_dit(2))
    batch = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([0, 1]),
    }
    names: dict[str, Any] = {
        "torch": torch,
        "teacher": teacher,
        "student": student,
        "batches": [batch],
        "denoising_loss": denoising_loss,
    }
    (code,) = blocks(ROOT / "README.md", "python")
    exec(code, names)
    alone = denoising_loss(names["prediction"], batch)
    assert names["loss"].item() > alone.item()
    block = student.transformer_blocks[0].attn1
    assert block.to_q.weight.grad.abs().max() > 0 and block.to_k.weight.grad.abs().max() > 0


def lively(model: ModelMixin) -> ModelMixin:
    """With weights by which blocks attend to something: of a new one adaLN-zero lets nothing through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model
