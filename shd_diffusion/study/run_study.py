"""`study`: run what is missing, then write up what there is."""

from __future__ import annotations

from pathlib import Path

from shd_diffusion.errors import UserError
from shd_diffusion.files import check_ours, check_outside
from shd_diffusion.study.config import StudyConfig, check_inputs, plan_runs
from shd_diffusion.study.page import write_study
from shd_diffusion.study.results import collect, read_known, write_results
from shd_diffusion.study.runner import Ended, carry_out


def run_study(study: StudyConfig, output: Path, command_line: str) -> Path:
    """Carry out a study, within its budget, and write its results; called again, it goes on.

    Args:
        command_line: the module whose `app` carries out `distill`, `sample` and `evaluate` in other processes.

    Returns:
        The page. Beside it are `study.json`, `runs.csv`, `results.csv`, `comparisons.csv` and `study.md`.

    Raises:
        UserError: the study's config is wrong, a folder holds another run, another command carries the study out, or
            runs failed or ask a person to fix something (after the others are written up).
    """
    check_ours(output, "study.json", "logs")
    planned = plan_runs(study, output)
    check_inputs(planned)
    for each in planned:
        check_outside(output, each.config.reads)
    known, ended = read_known(study, planned).outcomes, Ended()
    # of none begun, what there is is written up, also while another command is at work
    if study.budget.runs != 0:
        ended = carry_out(study, planned, known, output, command_line)
    results = collect(study, planned, read_known(study, planned))  # again, as there is a teacher now
    write_results(results, output)
    page = write_study(results, output / "study.html")
    if ended.to_mend or ended.failed:
        names = ", ".join(ended.failed)
        raise UserError(ended.to_mend or f"{output / 'logs'}: runs failed ({names}); their logs say why")
    return page
