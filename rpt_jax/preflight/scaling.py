"""python -m rpt_jax.preflight.scaling RUN.json … [--plot=FILE.png]

Compares the records that preflight wrote with --json for several numbers of chips: what each chip computes, reads and sends in a
step. Runs of one batch size on more and more chips show strong scaling; runs whose batch grows with the chips show weak scaling.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rpt_jax.config.user_paths import check_folder, check_local_path, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.command_line import run_command
from rpt_jax.infra.console import table

# Programs that run in every step.
_STEP_PROGRAMS = ("reshard", "sample", "reward", "training reward", "update")
_TERA = 1e12
PLOT_FORMATS = (".png", ".svg", ".pdf")


class Run(NamedTuple):
    """What one chip does in a step of a run.

    Attributes:
      topology: the chips, such as "v5p:4x4x4".
      chips: number of chips.
      prompts: prompts per step.
      teraflops: 1e12 FLOPs per chip.
      terabytes_of_memory: 1e12 bytes of memory traffic per chip.
      terabytes_sent: 1e12 bytes sent per chip.
      seconds: estimated time of a step.
    """

    topology: str
    chips: int
    prompts: int
    teraflops: float
    terabytes_of_memory: float
    terabytes_sent: float
    seconds: float


_QUANTITIES: dict[str, Callable[[Run], float]] = {
    "TFLOPs": lambda run: run.teraflops,
    "TB of memory": lambda run: run.terabytes_of_memory,
    "TB sent": lambda run: run.terabytes_sent,
}
# What the runs of each kind of scaling have in common.
SCALINGS: dict[str, Callable[[Run], float]] = {
    "strong": lambda run: run.prompts,
    "weak": lambda run: run.prompts / run.chips,
}


def main(argv: list[str]) -> int:
    """Run the command and return the exit code: 0, or 2 after a user error."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.preflight.scaling", description=description)
    parser.add_argument("runs", type=user_path, nargs="+", help="records written by preflight --json")
    parser.add_argument("--plot", type=user_path, help="image file to draw")
    options = parser.parse_args(argv[1:])
    try:
        check_local_path("--plot", options.plot)
        check_folder("--plot", options.plot)
        if options.plot and options.plot.suffix not in PLOT_FORMATS:
            raise UserError(f"--plot={options.plot} must end in {', '.join(PLOT_FORMATS)}.", field="--plot")
        runs = [read_run(path) for path in options.runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs.sort(key=lambda run: (run.prompts / run.chips, run.chips))
    quantities = [f"{name} per chip" for name in _QUANTITIES]
    columns = ["topology", "chips", "prompts per step", *quantities, "estimated s per step"]
    rows = [
        [run.topology, run.chips, run.prompts, *(get(run) for get in _QUANTITIES.values()), run.seconds] for run in runs
    ]
    table("One step on one chip", columns, rows)
    if options.plot:
        plot(runs, options.plot)
    return 0


def read_run(path: Path) -> Run:
    """Read a record of preflight.

    Raises:
      UserError: the file is missing or not the record of a config that compiles.
    """
    try:
        record = json.loads(path.read_text())
        programs = [program for program in record["programs"] if program["program"] in _STEP_PROGRAMS]
        sent = [collective["sent_bytes"] for program in programs for collective in program["collectives"]]
        return Run(
            topology=record["topology"],
            chips=record["chips"],
            prompts=record["prompts_per_step"],
            teraflops=sum(program["flops"] for program in programs) / _TERA,
            terabytes_of_memory=sum(program["memory_traffic_bytes"] for program in programs) / _TERA,
            terabytes_sent=sum(sent) / _TERA,
            seconds=record["estimated_step_seconds"],
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", field=str(path)) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a record written by preflight --json for a config that compiles ({error!r}).",
            field=str(path),
        ) from None


def plot(runs: list[Run], path: Path) -> None:
    """Plot each quantity over the number of chips, with one line for strong and one for weak scaling."""
    from matplotlib.figure import Figure  # Not pyplot, which would replace the backend of a notebook.

    figure = Figure(figsize=(4 * len(_QUANTITIES), 3.2), layout="constrained")
    panels = figure.subplots(1, len(_QUANTITIES), squeeze=False)[0]
    for panel, (name, get) in zip(panels, _QUANTITIES.items(), strict=True):
        for scaling, key in SCALINGS.items():
            line = sorted(largest_group(runs, key), key=lambda run: run.chips)
            panel.loglog([run.chips for run in line], [get(run) for run in line], "o-", base=2, label=scaling)
        panel.set(title=f"{name} per chip and step", xlabel="chips")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def largest_group(runs: list[Run], key: Callable[[Run], float]) -> list[Run]:
    """Return the largest group of runs with the same `key`."""
    groups: dict[float, list[Run]] = collections.defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return max(groups.values(), key=len)


if __name__ == "__main__":
    run_command(main)
