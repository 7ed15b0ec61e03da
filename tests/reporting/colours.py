"""How colours stand out from each other (WCAG 2)."""

from __future__ import annotations

import re

import numpy as np


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` or `#rrggbb`."""
    numbers = (
        re.findall(r"\d+", colour)
        if "(" in colour
        else [int(p, 16) for p in re.findall("[0-9a-f]{2}", colour)]
    )
    levels = [int(level) / 255 for level in numbers[:3]]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
