"""Compare what a budget is best spent on: run arms, seeds and budgets one after another, and write one table and one page.

    python -m rpt_jax.study --config=configs/study_tiny.py [--workdir=DIR] [--part=0/4] [--unit=rpt/seed0] [--dry-run]

Every run is an ordinary command in a directory of its own, with its output in a file beside it. The same command
resumes: complete runs are skipped, others go on from their checkpoints, and those that failed are tried again. Processes
with different parts may run at the same time in one workdir, also on several machines that share it.

Exit codes: 0 complete, 2 something to fix, 5 some units failed, 75 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rpt_jax.config.user_paths import check_local_path, user_path
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.command_line import command_parser, import_jax, run_command

if TYPE_CHECKING:
    from rpt_jax.study.plan import UnitPlan

logger = logging.getLogger("rpt_jax.study")

_EXTRA_GRACE_SECONDS = 10.0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = command_parser("study", __doc__ or "")
    parser.add_argument("--config", required=True, help="config file of the study")
    parser.add_argument("--workdir", help="directory of the study; default: runs/<name of the config>")
    parser.add_argument("--part", default="", help='run a share of the units, such as "3/12" of "0/12" to "11/12"')
    parser.add_argument(
        "--unit", action="append", help='run this unit, named by its directory in the workdir, such as "rpt/seed0"'
    )
    parser.add_argument(
        "--results",
        action="append",
        help="results.json of the same study in another workdir: its units are not run again",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the units and the commands that are left, and exit"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    options = make_parser().parse_args(argv[1:])
    try:
        for name, paths in (("--workdir", [options.workdir]), ("--results", options.results or [])):
            for path in paths:
                check_local_path(name, path)
        import_jax()
        from rpt_jax.infra.console import console_logging

        with console_logging():
            return run_study(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR


def run_study(options: argparse.Namespace) -> int:
    """Run the part of a study that the flags name; return the exit code. Raises: UserError."""
    from rpt_jax.config.loading import load_study
    from rpt_jax.infra.signals import StopSignals
    from rpt_jax.study.execution import Executor, Stopped, run_units
    from rpt_jax.study.page import write_page
    from rpt_jax.study.plan import check_inputs, check_stages, config_values, make_plan, select_units
    from rpt_jax.study.workdir import claim, read_recorded, read_taken, write_results

    # Check everything that can be checked before the first run.
    study = load_study(options.config)
    experiments = check_stages(study)
    name = Path(options.config).stem
    workdir = options.workdir or f"runs/{name}"
    directory = user_path(workdir).resolve()
    units = make_plan(study, directory)
    mine = select_units(units, directory, options.part, options.unit or ())
    taken = [outcome for path in options.results or () for outcome in read_taken(user_path(path), study, units)]
    # A unit whose directory is gone, or in another workdir, is complete if its results are there.
    recorded = read_recorded(directory, taken)
    left = [unit for unit in mine if not unit.is_complete and unit.unit not in recorded]
    if left:
        check_inputs(study, experiments)
    if options.dry_run:
        show_plan(mine, left)
        return ExitCode.COMPLETE
    claim(directory, config_values(study, experiments))
    command = shlex.join(["python", "-m", "rpt_jax.study", f"--config={options.config}", f"--workdir={workdir}"])
    write_results(study, name, units, directory, command, taken)
    mine = [unit for unit in mine if unit.is_complete or unit.unit not in recorded]

    # Run the units. A stop signal leaves the run that is going on the time to save.
    grace = max(experiment.checkpoint.grace_seconds for experiment in experiments.values())
    signals = StopSignals(grace + _EXTRA_GRACE_SECONDS)
    with signals.handle():
        executor = Executor(directory, signals)
        try:
            failed = run_units(mine, executor, lambda: write_results(study, name, units, directory, command))
        except Stopped:
            return ExitCode.RESTART  # At the end of the block, the signal ends the process.
        outcomes = write_results(study, name, units, directory, command)
    for path in write_page(outcomes, directory):
        logger.info("%s", path)
    return ExitCode.FAILED_UNITS if failed else ExitCode.COMPLETE


def show_plan(units: Sequence[UnitPlan], left: Sequence[UnitPlan]) -> None:
    """Print the units, and the commands of the runs that are left. A run that several units have in common is printed once.

    Args:
      units: all.
      left: those of them that are not complete.
    """
    from rpt_jax.study.execution import planned_command

    shown: set[Path] = set()
    for unit in units:
        if unit not in left:
            print(f"{unit.unit}: complete")
            continue
        print(f"{unit.unit}: {unit.directory}")
        for run in unit.runs:
            if run.is_complete:
                print(f"  {run.name}: complete")
                continue
            is_shared = run.directory in shown
            shown.add(run.directory)
            print(f"  {run.name}: {f'as in {run.directory}' if is_shared else shlex.join(planned_command(run))}")
    print(f"left to run: {len(left)} of {len(units)} units, {len(shown)} runs")


if __name__ == "__main__":
    run_command(main)
