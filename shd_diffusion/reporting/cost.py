"""What runs cost, as `benchmark` has measured it: for the table of results, the plots, and a table of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shd_diffusion.protocol import flatten
from shd_diffusion.reporting.runs import Benchmark, Run, Timing
from shd_diffusion.reporting.tables import count, duration


@dataclass(frozen=True, slots=True)
class Cost:
    """One thing that a model takes.

    Attributes:
        title: of a column.
        short: the same in a narrow one; empty: there is no place for it.
        of: it, of a run; None where it is not known.
        text: a value as it is printed.
    """

    title: str
    short: str
    of: Callable[[Run], float | None]
    text: Callable[[float], str]


PARAMETERS = Cost("Parameters", "Params", lambda run: run.summary.parameters, count)
TRAINING_TIME = Cost("Training", "", lambda run: run.training_seconds, duration)
MEMORY = Cost("Memory", "", lambda run: _peak(run), lambda value: f"{count(value)}B")
SAMPLING_TIME = Cost("Time an image", "Time", lambda run: run.seconds_per_image, duration)


def measured_costs(runs: Sequence[Run]) -> list[Cost]:
    """Multiply-adds and time of an image, or of a denoiser call where none was sampled; nothing without a benchmark."""
    known = [run.benchmark for run in runs if run.benchmark]
    if not known:
        return []
    what = "image" if all(each.macs_image is not None for each in known) else "call"
    named = "an image" if what == "image" else "a call"

    def macs(run: Run) -> float | None:
        found = run.benchmark
        return None if found is None else found.macs_image if what == "image" else found.macs_call

    def seconds(run: Run) -> float | None:
        timing = None if run.benchmark is None else first_timing(run.benchmark, what)
        return None if timing is None else timing.seconds.median / timing.batch_size

    return [
        Cost(f"Multiply-adds {named}", "", macs, count),
        Cost(f"Time {named}", "Time", seconds, duration),
    ]


def _peak(run: Run) -> float | None:
    """Bytes that the smallest batch of images needs at most, or of calls where none was sampled."""
    if run.benchmark is None:
        return None
    timing = first_timing(run.benchmark, "image") or first_timing(run.benchmark, "call")
    return None if timing is None else timing.peak_bytes


def saving(run: Run, runs: Sequence[Run]) -> str | None:
    """What a student saves beside its teacher, and how long it trained: `has 0.21 times the parameters of the teacher,
    and was trained in 60 s`; None where neither is known."""
    timed = measured_costs(runs)
    costs = [(PARAMETERS, "parameters"), *((cost, cost.title.lower()) for cost in timed), (MEMORY, "memory")]
    shares = [(share(run, cost, runs), what) for cost, what in costs]
    told = [f"{times:.2f} times the {what}" for times, what in shares if times is not None]
    seconds = TRAINING_TIME.of(run)
    parts = [f"has {', '.join(told)} of the teacher"] if told else []
    parts += [] if seconds is None else [f"was trained in {duration(seconds)}"]
    return ", and ".join(parts) or None


def unequal_lengths(runs: Sequence[Run]) -> str | None:
    """That students had different numbers of steps, or a run less than it was to have; None where neither is so."""
    trained = [run for run in runs if run.compression is None]
    short = {run.name for run in trained if run.summary.steps < run.max_steps}
    students = [run for run in trained if not run.is_teacher]
    differ = len({run.summary.steps for run in students}) > 1
    told = [
        f"{run.name}: {run.summary.steps:,}" + (f" of {run.max_steps:,}" if run.name in short else "")
        for run in trained
        if run.name in short or (differ and not run.is_teacher)
    ]
    return f"Runs of unequal length, in steps: {', '.join(told)}." if told else None


def first_timing(benchmark: Benchmark, what: str) -> Timing | None:
    """That of the smallest batch."""
    found = [timing for timing in benchmark.timings if timing.what == what]
    return min(found, key=lambda timing: timing.batch_size, default=None)


def share(run: Run, cost: Cost, runs: Sequence[Run]) -> float | None:
    """How many times the teacher's a student's cost is; None where that is not known, or there are several teachers.

    Parameters compare always, what was measured only where one benchmark has measured both.
    """
    teachers = [each for each in runs if each.is_teacher]
    if len(teachers) != 1 or run.is_teacher:
        return None
    of_student, of_teacher = cost.of(run), cost.of(teachers[0])
    if not of_student or not of_teacher:
        return None
    if cost is PARAMETERS:
        return of_student / of_teacher
    if cost is SAMPLING_TIME or cost is TRAINING_TIME or len(_sessions([run, *teachers])) > 1:
        return None
    return of_student / of_teacher


def _sessions(runs: Sequence[Run]) -> set[tuple[str, ...]]:
    """Which calls of `benchmark` have measured runs."""
    return {
        tuple(f"{key}={value}" for key, value in flatten({**each.environment, **each.benchmark}).items())
        for each in (run.benchmark for run in runs)
        if each is not None
    }


def cost_note(runs: Sequence[Run]) -> str | None:
    """How the costs were measured, and whether they compare; None without a benchmark."""
    known = [run.benchmark for run in runs if run.benchmark]
    if not known:
        return None
    if len(_sessions(runs)) > 1:
        return "Multiply-adds and times are of different calls of benchmark, so times do not compare."
    how, sampling = known[0].benchmark, known[0].benchmark.get("sampling", {})
    batch = min(timing.batch_size for timing in known[0].timings)
    ways = [str(sampling.get("dtype")), f"on {how.get('device')}"]
    ways += [f"{how.get('threads')} threads"] if how.get("device") == "cpu" else []
    ways += [f"attention {sampling['attention']}"] if sampling.get("attention") else []
    ways += ["compiled"] if sampling.get("compile") else []
    ways += ["TF32"] if sampling.get("allow_tf32") else []
    return (
        f"Multiply-adds and times by benchmark: {', '.join(ways)}, {sampling.get('num_inference_steps')} steps, "
        f"batch {batch}, medians of {how.get('rounds')} rounds in turns."
    )


def cost_lines(runs: Sequence[Run]) -> list[list[str]]:
    """A line a run with all that a benchmark has measured, headings first; empty where none has."""
    known = [(run, run.benchmark) for run in runs if run.benchmark]
    if not known:
        return []
    measured = list(dict.fromkeys((t.what, t.batch_size) for _, found in known for t in found.timings))
    largest, least = (most(batch for _, batch in measured) for most in (max, min))
    keys = [(what, batch) for what, batch in measured if what == "call" or batch == least]
    head = ["Run", "Multiply-adds a call", "Calls an image"]
    head += [f"{'Call' if what == 'call' else 'Image'}, batch {batch}" for what, batch in keys]
    head += [f"Images a second, batch {largest}", f"Memory, batch {largest}"]

    def line(run: Run, found: Benchmark) -> list[str]:
        timings = {(timing.what, timing.batch_size): timing for timing in found.timings}
        image = timings.get(("image", largest))
        most = image or timings.get(("call", largest))
        return [
            run.name,
            count(found.macs_call),
            "–" if found.calls_per_image is None else str(found.calls_per_image),
            *(_timing_text(timings.get(key)) for key in keys),
            "–" if image is None else f"{image.per_second:.3g}",
            "–" if most is None else f"{count(most.peak_bytes)}B",
        ]

    return [head, *(line(run, found) for run, found in known)]


def _timing_text(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    low, high = map(duration, timing.seconds.quartiles)
    return f"{duration(timing.seconds.median)} [{low}, {high}]"
