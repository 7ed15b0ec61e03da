"""Which classes are hard: the Fréchet distance of each class on its own."""

from __future__ import annotations

from collections.abc import Sequence

from shd_diffusion.reporting.drawing import Drawing, Look, finish, legend_above, panel
from shd_diffusion.reporting.runs import Run


def per_class_fid(runs: Sequence[Run], looks: dict[str, Look]) -> Drawing | None:
    """FID by class; None where no evaluation has it."""
    known = [(run, run.metrics.per_class_fid) for run in runs if run.metrics and run.metrics.per_class_fid]
    if not known:
        return None
    labels = list(dict.fromkeys(label for _, values in known for label in values))
    with panel() as (figure, axes):
        for run, values in known:
            look = looks[run.name]
            places = [labels.index(label) for label in values]
            axes.plot(
                places, list(values.values()), look.marker, color=look.colour, markersize=5, label=run.name
            )
        if len(labels) <= 20:
            axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel="class", ylabel="FID of the class")
        axes.set_ylim(bottom=0)
        legend_above(figure, axes)
        return finish(figure, "fid-per-class", "FID by class")
