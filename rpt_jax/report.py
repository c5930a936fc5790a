"""python -m rpt_jax.report --workdir=WORKDIR

Writes the page of a run, `WORKDIR/report.html`, and draws its plots into `WORKDIR/plots/`, from what training has written so far.
Training itself writes the page at every evaluation and both when it ends. With several `--workdir`, the page compares the runs.
`--serve` shows the page at an address of this machine and keeps it up to date. If WORKDIR is that of a study, its page, tables
and picture are written again from `results.json` alone. Exit codes: 0, or 2 if a directory is neither that of a run nor of a
study.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rpt_jax.config.user_paths import check_local_path, check_location, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.command_line import import_jax, run_command
from rpt_jax.infra.run_format import METRICS, POLICY, STUDY_RESULTS
from rpt_jax.infra.storage import LARGE_FOLDERS, fetch, with_urls

_COMPARISON = "comparison.html"  # Name of the page of several runs, in the directory of the first.


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.report", description=description)
    parser.add_argument(
        "--workdir",
        required=True,
        action="append",
        help="directory of a run or of a study, or its URL; may be repeated",
    )
    parser.add_argument("--output", type=user_path, help="file to write the page of runs to")
    parser.add_argument("--serve", action="store_true", help="serve the page instead of writing files, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, help="port to serve at; 0 for any (default: %(default)s)")
    options = parser.parse_args(argv[1:])
    try:
        check_local_path("--output", options.output)
        if options.serve:
            for location in options.workdir:
                check_local_path("--workdir", location)
        import_jax()
        workdirs = [_find_workdir(location) for location in options.workdir]
        if studies := [workdir for workdir in workdirs if (workdir / STUDY_RESULTS).exists()]:
            if len(workdirs) > 1 or options.serve or options.output:
                message = f"--workdir={studies[0]} is that of a study: give it alone, without --serve and --output."
                raise UserError(message, field="--workdir")
            _write_study(studies[0])
        elif options.serve:
            _serve(workdirs, options.port)
        else:
            _write(workdirs, options.output)
    except (UserError, OSError) as error:
        print(with_urls(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


def _find_workdir(location: str) -> Path:
    """Return the directory of a run or of a study, for a URL a copy of it. Raises: UserError, if it is neither."""
    from rpt_jax.infra.workdir import is_run_directory

    check_location("--workdir", location)
    workdir = fetch(location, "--workdir", skip={*LARGE_FOLDERS, POLICY})
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is not the directory of a run.", field="--workdir")
    if not any((workdir / name).exists() for name in (METRICS, STUDY_RESULTS)) and not is_run_directory(workdir):
        raise UserError(
            f"{workdir / METRICS} is missing, and so is a run's config: --workdir={workdir} is not the directory of a run.",
            field="--workdir",
        )
    return workdir


def _write_study(workdir: Path) -> None:
    """Write the page, the tables and the picture of a study. Raises: UserError."""
    from rpt_jax.study.outcome import read_outcomes
    from rpt_jax.study.page import write_page

    outcomes = read_outcomes(workdir / STUDY_RESULTS)
    try:
        for path in write_page(outcomes, workdir):
            print(path)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to ({error.strerror}).", field="--workdir") from None


def _write(workdirs: list[Path], output: Path | None) -> None:
    """Write the page and, of each run, the plots for which it has what they need. Raises: UserError."""
    from rpt_jax.infra.plots import write_plots
    from rpt_jax.run_page.build import REPORT, write_page

    path = output or workdirs[0] / (REPORT if len(workdirs) == 1 else _COMPARISON)
    try:
        print(write_page(workdirs, path))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another --output.", field="--output"
        ) from None
    for workdir in workdirs:
        try:
            for plot in write_plots(workdir):
                print(plot)
        except (UserError, OSError) as error:
            print(f"warning: not all plots could be drawn: {error}", file=sys.stderr)


def _serve(workdirs: list[Path], port: int) -> None:
    """Serve the page until Ctrl-C. Raises: UserError."""
    from rpt_jax.run_page.server import RunServer

    try:
        server = RunServer(workdirs, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port={port} cannot be used ({error}): choose another one, or 0 for any.", field="--port"
        ) from None
    with server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    run_command(main)
