"""What a benchmark came to, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from shd_diffusion.progress import printable
from shd_diffusion.reporting.tables import count, duration, terminal


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Sizes, a line a model; and times, a line a model, batch and kind."""
    models, settings = results["models"], results["benchmark"]
    head = ["Model", "Params", "", "MACs a call", "", "Calls", "MACs an image", ""]
    lines = [head, *(_size(name, each) for name, each in models.items())]
    yield terminal(lines, title=f"What models cost; x times {escape(printable(settings['first']))}")
    head = ["", "Model", "Median", "Quartiles", "", "A second", "Memory"]
    rows = [head]
    for place in range(len(next(iter(models.values()))["timings"])):
        for name, each in models.items():
            rows.append(_timing(name, each["timings"][place], named=name == settings["first"]))
    how = settings["sampling"]
    ways = [settings["device"], how["dtype"], *(["compiled"] if how["compile"] else [])]
    ways += [f"attention {how['attention']}"] if how["attention"] else []
    yield terminal(
        rows,
        left=2,
        title=f"{', '.join(ways)}, {settings['rounds']} rounds; memory {settings['memory']}",
    )


def _size(name: str, model: Mapping[str, Any]) -> list[str]:
    ratios = model["ratios"]
    cells = [name]
    for key in ("parameters", "macs_call"):
        cells += [count(model[key]), times(ratios.get(key))]
    if model["macs_image"] is None:
        return [*cells, "–", "–", ""]
    return [
        *cells,
        str(model["calls_per_image"]),
        count(model["macs_image"]),
        times(ratios.get("macs_image")),
    ]


def _timing(name: str, timing: Mapping[str, Any], named: bool) -> list[str]:
    low, high = map(duration, timing["seconds"]["quartiles"])
    return [
        f"{timing['what']} ×{timing['batch_size']}" if named else "",
        name,
        duration(timing["seconds"]["median"]),
        f"{low} to {high}",
        times(timing["ratio"]["median"]),
        f"{timing['per_second']:.3g}",
        f"{count(timing['peak_bytes'])}B",
    ]


def times(ratio: float | None) -> str:
    """A ratio to the first model."""
    return "" if ratio is None else f"{ratio:.2f}x"
