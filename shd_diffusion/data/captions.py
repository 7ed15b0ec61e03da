"""What a caption may be: a text that says something, or several of an image."""

from __future__ import annotations

import re
import reprlib

from shd_diffusion.errors import UserError, did_you_mean

KEY = "data.caption_column"


def captions_of(value: object, where: str) -> list[str]:
    """The captions that a data set gives for one image: a string or a list of strings, none of them blank.

    Args:
        value: what the data set holds.
        where: what to call it in a message: the file and the image, line or key.

    Raises:
        UserError: it is no such thing.
    """
    captions = []
    for caption in value if isinstance(value, list) else [value]:
        if not isinstance(caption, str):
            raise UserError(f"{KEY}: {where} is {reprlib.repr(caption)}; give a string or a list of strings")
        if not caption.strip():
            raise UserError(f"{KEY}: {where} is {caption!r}; write a caption there, or remove the image")
        check_characters(caption, f"{KEY}: {where}")
        captions.append(caption)
    if captions:
        return captions
    raise UserError(f"{KEY}: {where} is an empty list; write a caption there, or remove the image")


def check_characters(text: str, where: str) -> None:
    """See that a text is made of whole characters, as tokenizers and files take them.

    Raises:
        UserError: it holds half of one, as what was cut by UTF-16's count does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"its character {error.start + 1} is half of one ({text[error.start]!r})"
        raise UserError(f"{where}: {place}; mend it") from None


def captions_of_text(content: bytes, where: str, key: str = KEY) -> list[str]:
    """The captions of a text file, one a line; blank lines are passed over.

    Args:
        where: what to call the file in a message.
        key: that the config names the file by.

    Raises:
        UserError: it is not in UTF-8, or holds none.
    """
    try:
        # not str.splitlines, which splits at characters that stand within a caption
        lines = [line.strip() for line in re.split(r"\r\n?|\n", content.decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {where}: not a text in UTF-8 ({error.reason}); convert it") from None
    if captions := [line for line in lines if line]:
        return captions
    raise UserError(f"{key}: {where} holds no text; write it there, one caption a line")


def captions_of_key(content: object, key: str, where: str) -> list[str]:
    """The captions under a key of a JSON object.

    Raises:
        UserError: it is no object, has no such key, or holds no captions there.
    """
    if not isinstance(content, dict):
        raise UserError(f'{KEY}: {where}: not an object of JSON; write {{"{key}": "a caption", ...}}')
    if key not in content:
        raise UserError(f"{KEY}: {where} has no key `{key}`; {did_you_mean(key, content)}")
    return captions_of(content[key], f"{where}: key `{key}`")
