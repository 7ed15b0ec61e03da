"""The demos: the whole way from a teacher to a page that compares its students, on handwritten digits or, from text to
image, on emoji."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# On digits: half of the config's batch at twice its learning rate, fewer steps for students, more images in a pass.
QUICK = ("train.batch_size=64", "train.learning_rate=4e-3", "sample.pass_size=200")
STUDENT_STEPS = "train.max_steps=400"


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the command line.

    Attributes:
        quiet: what it writes to standard output also stands in files.
        made: what it leaves, where it would begin anew though that is there; each other command goes on by itself.
    """

    title: str
    command: list[str]
    quiet: bool = False
    made: Path | None = None


def steps(folder: Path, overrides: Sequence[str] = ()) -> list[Step]:
    """What the demo on digits does, one after the other.

    Args:
        folder: of the runs.
        overrides: of the trainings' configs, as `train.max_steps=20`; the stages behind them follow the runs' configs.
    """
    teacher, squeezed = folder / "teacher", folder / "squeezed"
    runs = [str(folder / name) for name in ("teacher", "none", "kd", "kd-shd", "squeezed")]

    def student(name: str, *switched_off: str) -> list[str]:
        settings = [
            f"teacher.path={teacher}",
            *(f"losses.{term}.weight=0" for term in switched_off),
            *QUICK,
            STUDENT_STEPS,
            *overrides,
        ]
        return ["distill", "configs/digits/distill.yaml", *_sets(settings), "--output", str(folder / name)]

    return [
        Step(
            "a teacher with 12 heads",
            [
                "train-teacher",
                "configs/digits/teacher.yaml",
                *_sets([*QUICK, *overrides]),
                "--output",
                str(teacher),
            ],
        ),
        Step("a student with 5 heads: denoising loss alone", student("none", "output", "shd")),
        Step("the same student: with output KD", student("kd", "shd")),
        Step("the same student: with output KD and SHD", student("kd-shd")),
        Step(
            "the teacher itself with 5 heads, by least squares, without training",
            ["compress", str(teacher), "--heads", "5", "--output", str(squeezed)],
            made=squeezed / "summary.json",
        ),
        Step("images from each", ["sample", *runs]),
        Step("metrics", ["evaluate", *runs], quiet=True),
        Step("what they cost", ["benchmark", *runs, "--batch-size", "16", "--rounds", "3"], quiet=True),
        Step("report", ["report", *runs, "--output", str(folder / "report.html")]),
    ]


def text_steps(folder: Path, overrides: Sequence[str] = ()) -> list[Step]:
    """What the demo from text to image does; arguments as for `steps`."""
    base, teacher, squeezed, cache = (folder / name for name in ("base", "teacher", "squeezed", "cache"))
    students = [str(folder / name) for name in ("kd", "kd-shd")]
    runs = [str(teacher), *students]
    of_teacher = ["configs/emoji/teacher.yaml", *_sets([f"pipeline={base}", f"prepare.output={cache}"])]
    parts = [f"teacher.path={teacher}", f"prepare.output={cache}", f"student.pretrained={squeezed}"]
    distill = ["distill", "configs/emoji/distill.yaml", *_sets([*parts, *overrides])]
    kd, kd_shd = students
    half = ["--heads", "3", "--neurons", "0.5", "--images", "512"]

    return [
        Step(
            "a text encoder, and an autoencoder of emoji",
            ["make-pipeline", "configs/emoji/pipeline.yaml", "--output", str(base)],
            made=base / "model_index.json",
        ),
        Step(
            "pictures and names to latents and embeddings", ["prepare", *of_teacher, "--output", str(cache)]
        ),
        Step(
            "a teacher with 8 heads",
            ["train-teacher", *of_teacher, *_sets(overrides), "--output", str(teacher)],
        ),
        Step(
            "3 heads and half of the neurons by least squares, without training",
            ["compress", str(teacher), *half, "--output", str(squeezed)],
            made=squeezed / "model_index.json",
        ),
        Step(
            "that student healed by output KD",
            [*distill, *_sets(["losses.shd.weight=0"]), "--output", kd],
        ),
        Step("by output KD and SHD", [*distill, "--output", kd_shd]),
        Step("images of prompts, some of them never seen", ["sample", *runs]),
        Step("students against their teacher", ["evaluate", *students], quiet=True),
        Step("what they cost", ["benchmark", *runs, "--batch-size", "4", "--rounds", "3"], quiet=True),
        Step("report", ["report", *runs, "--output", str(folder / "report.html")]),
    ]


def _sets(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
