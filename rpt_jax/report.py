"""python -m rpt_jax.report --workdir=WORKDIR

Draws the plots of a run again from its `metrics.jsonl` and `result.json`, into `WORKDIR/plots/`. Training writes the same
plots when it ends. Exit codes: 0, or 2 if a file is missing or not that of a finished run.
"""

from __future__ import annotations

import argparse
import sys

from rpt_jax.config.user_paths import check_local_path, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.command_line import import_jax, run_command


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.report", description=description)
    parser.add_argument("--workdir", type=user_path, required=True, help="directory of the run")
    options = parser.parse_args(argv[1:])
    try:
        check_local_path("--workdir", options.workdir)
        if not options.workdir.is_dir():
            raise UserError(f"--workdir={options.workdir} is not the directory of a run.", field="--workdir")
        import_jax()
        from rpt_jax.infra.plots import write_plots

        for path in write_plots(options.workdir):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
