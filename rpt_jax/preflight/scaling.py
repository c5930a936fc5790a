"""python -m rpt_jax.preflight.scaling RUN.json … [--plot=FILE.png]

Puts what preflight wrote with --json for several numbers of chips side by side: what each chip computes, reads and sends in a
step. Runs of one batch on ever more chips are strong scaling, those whose batch grows with the chips are weak scaling.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.infra.console import table

_STEP = ("reshard", "sample", "reward", "training reward", "update")
# What the runs of a line have in common.
LINES = {"strong": lambda run: run["prompts"], "weak": lambda run: run["prompts"] / run["chips"]}
_PARTS = {"TFLOPs": 1e12, "TB of memory": 1e12, "TB sent": 1e12}


def main(argv: list[str]) -> int:
    """Return the exit code: 0, or 2 where a sentence says what to mend."""
    parser = argparse.ArgumentParser(
        prog="python -m rpt_jax.preflight.scaling", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("runs", type=Path, nargs="+", help="files of preflight's --json")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    options = parser.parse_args(argv[1:])
    try:
        runs = sorted(
            (read(path) for path in options.runs), key=lambda run: (run["prompts"] / run["chips"], run["chips"])
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    columns = ["topology", "chips", "prompts a step", *(f"{part} a chip" for part in _PARTS), "s a step, estimated"]
    rows = [[r["topology"], r["chips"], r["prompts"], *(r[part] for part in _PARTS), r["seconds"]] for r in runs]
    table("A step, a chip", columns, rows)
    if options.plot:
        plot(runs, options.plot)
    return 0


def read(path: Path) -> dict[str, Any]:
    """What a chip does in a step, from a file of preflight's. Raises: UserError, where it is none of a run that was compiled."""
    try:
        found = json.loads(path.read_text())
        programs = [p for p in found["programs"] if p["program"] in _STEP]
        figures = [
            (p["flops"], p["memory_traffic_bytes"], sum(c["sent_bytes"] for c in p["collectives"])) for p in programs
        ]
        totals = [sum(part) / unit for part, unit in zip(zip(*figures, strict=True), _PARTS.values(), strict=True)]
        run = {"topology": found["topology"], "chips": found["chips"], "prompts": found["prompts_per_step"]}
        return run | {"seconds": found["estimated_step_seconds"]} | dict(zip(_PARTS, totals, strict=True))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not what preflight writes with --json for a config that compiles ({error!r})."
        ) from None


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw each part over the chips, with a line for the runs of one batch and one for those of as many prompts a chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(_PARTS), figsize=(4 * len(_PARTS), 3.2), layout="constrained")
    for panel, part in zip(panels, _PARTS, strict=True):
        for name, key in LINES.items():
            line = sorted(alike(runs, key), key=lambda r: r["chips"])
            panel.loglog([r["chips"] for r in line], [r[part] for r in line], "o-", base=2, label=name)
        panel.set(title=f"{part} a chip and step", xlabel="chips")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def alike(runs: list[dict[str, Any]], key: Callable[[dict[str, Any]], float]) -> list[dict[str, Any]]:
    """The most runs that have `key` in common."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return max(groups.values(), key=len)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
