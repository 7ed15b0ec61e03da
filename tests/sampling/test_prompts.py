"""Prompts from text files, JSON lines and folders, and what is said of files that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shd_diffusion.errors import UserError
from shd_diffusion.sampling.prompts import Prompt, read_prompts


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    # a line separator and a vertical tab stand within a prompt; the rest are line ends and a byte order mark
    path.write_bytes("\ufeffein rotes Herz\r\n a cat\u2028and a dog\x0b! \n最後".encode())
    assert read_prompts(path) == [
        Prompt("ein rotes Herz", "00000"),
        Prompt("a cat\u2028and a dog\x0b!", "00001"),
        Prompt("最後", "00002"),
    ]


def test_json_lines_keep_their_other_keys(tmp_path: Path) -> None:
    """A line of GenEval's evaluation_metadata.jsonl."""
    line = {
        "tag": "counting",
        "include": [{"class": "bench", "count": 2}],
        "prompt": "a photo of two benches",
    }
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps({"prompt": "a cow"}) + "\n" + json.dumps(line) + "\n")
    first, second = read_prompts(path)
    assert first == Prompt("a cow", "00000")
    assert (second.text, second.id) == ("a photo of two benches", "00001")
    assert second.metadata == {"tag": "counting", "include": [{"class": "bench", "count": 2}]}


def test_a_folder_has_a_prompt_a_file(tmp_path: Path) -> None:
    """DPG-Bench's prompts have no line feed at their end."""
    for stem, text in (("whoops7", "b"), ("0", "a\nlong one"), ("COCOval2014000000001244", "c\n")):
        (tmp_path / f"{stem}.txt").write_text(text)
    (tmp_path / "README.md").write_text("of no prompt")
    assert [(prompt.id, prompt.text) for prompt in read_prompts(tmp_path)] == [
        ("0", "a\nlong one"),
        ("COCOval2014000000001244", "c"),
        ("whoops7", "b"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", None, r"p\.txt: cannot be read \(No such file or directory\); give"),
        ("p.txt", b"", r"p\.txt: is empty; write"),
        ("p.txt", "Käse".encode("latin-1"), r"p\.txt: is not in UTF-8; save"),
        ("p.txt", b"a\n \t\nb\n", r"p\.txt: line 2 is blank; write"),
        ("p.txt", b"a\n\n", r"p\.txt: line 2 is blank; write"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}', r"p\.jsonl: line 2 has no key `prompt`; add it"),
        ("p.jsonl", b'{"prompt": 7}', r"p\.jsonl: line 1: its prompt is 7, not a text; write"),
        ("p.jsonl", b'{"prompt": ""}', r"p\.jsonl: line 1 is blank; write"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]', r"p\.jsonl: line 2 is no JSON object; write"),
        ("p.jsonl", b"a cat", r"p\.jsonl: line 1 is no JSON object; write"),
        (
            "p.jsonl",
            b'{"prompt": "cat \\ud83d"}',
            r"p\.jsonl: line 1: its character 5 is half of one .*; mend it",
        ),
        ("d/notes.md", b"a cat", r"d: no \.txt files in this folder; give"),
        ("d/a.txt", b" \n", r"d/a\.txt is blank; write"),
    ],
)
def test_what_holds_no_prompts_is_one_line(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        read_prompts(path.parent if name.startswith("d/") else path)
    assert "\n" not in str(refused.value)
