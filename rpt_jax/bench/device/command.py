"""What this machine's accelerator reaches, part by part, in a limited time and without a network.

Each part runs in a process of its own with a share of --minutes, so that one that fails, hangs or runs out of memory does
not end the others. --json is written after every measurement; what the processes print is next to it, in a file that ends
in .log. Without an accelerator, sizes are tiny: to try the command, not for figures. The format of --json is in
docs/guides/measure-a-device.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping
from typing import Any

from rpt_jax import __version__
from rpt_jax.bench.device.parts import MACHINE, PARTS
from rpt_jax.bench.device.runner import COMPLETE, Part, Record, run_parts
from rpt_jax.bench.device.sizes import SIZES
from rpt_jax.bench.measure import round_to_4_digits
from rpt_jax.bench.options import positive_number
from rpt_jax.errors import ExitCode, UserError, check_choice
from rpt_jax.infra.console import table
from rpt_jax.infra.source_commit import source_commit

FORMAT = 1
_MEASURED = [name for name in PARTS if name != MACHINE]
_START_SECONDS = 120.0  # For the first process, which starts the device.
_CELL_WIDTH = 60


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--minutes", type=positive_number, default=8.0, help="time limit of all parts together")
    parser.add_argument(
        "--parts", default=",".join(_MEASURED), help="parts to run, separated by commas; default: %(default)s"
    )
    parser.add_argument("--sizes", choices=tuple(SIZES), help="default: full on an accelerator, tiny on a CPU")


def run(options: argparse.Namespace) -> int:
    """Measure, and return the exit code.

    This process leaves the devices alone: a part needs all of their memory.

    Raises:
      UserError: an option is invalid, or no device answers.
    """
    if not options.json:
        raise UserError("--json=FILE is missing: figures are written to it as they come.", field="--json")
    chosen = {check_choice("--parts", name, _MEASURED) for name in options.parts.split(",")}
    record = Record(
        options.json,
        {
            "format": FORMAT,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rpt_jax": __version__,
            "commit": source_commit(),
            "command": sys.argv,
            "minutes": options.minutes,
        },
    )
    log = options.json.with_suffix(".log")
    log.unlink(missing_ok=True)
    environment = {"PYTHONUNBUFFERED": "1", **os.environ}

    # Find out which device there is.
    seconds = 60 * options.minutes
    run_parts([_part(MACHINE, "tiny")], min(_START_SECONDS, seconds), record, log, environment)
    found = record.part(MACHINE)
    if found["status"] != COMPLETE:
        reasons = "; ".join(found["notes"]) or f"no answer within {found['limit_seconds']:.0f} s"
        raise UserError(f"JAX does not start on this machine's devices: {reasons}", field="device")
    machine = found["machine"]
    sizes = options.sizes or ("tiny" if machine["platform"] == "cpu" else "full")
    record.content |= {"machine": machine, "sizes": sizes}

    # Run the parts.
    parts = [_part(name, sizes) for name in _MEASURED if name in chosen]
    run_parts(parts, seconds - found["seconds"], record, log, environment, _show_message)
    del record.content["parts"][MACHINE]
    record.content["ratios"] = compare_with_transformers(record.content["parts"])
    record.save()
    _show_tables(record.content)
    return ExitCode.COMPLETE


def _part(name: str, sizes: str) -> Part:
    command = (sys.executable, "-m", "rpt_jax.bench.device.part_process", name, sizes)
    return Part(name=name, weight=max(PARTS[name].weight, 1), command=command)


def compare_with_transformers(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return our tokens per second over those of `transformers`, for rollouts (with prefill) and for updates.

    Args:
      parts: entries of the record, by name.
    """
    ratios = []
    for theirs in parts.get("transformers", {}).get("figures", []):
        work = theirs["work"].partition(",")[0]
        if work not in ("rollout", "update"):
            continue
        for ours in parts.get(work, {}).get("figures", []):
            same = all(ours[key] == theirs[key] for key in ("model", "live", "context"))
            if same and ours.get("prompts") != "repeated":
                rate = ours["with_prefill"] if work == "rollout" else ours["tokens_per_second"]
                labels = {key: theirs[key] for key in ("work", "model", "live", "context")}
                ratios.append(labels | {"times_transformers": round_to_4_digits(rate / theirs["tokens_per_second"])})
    return ratios


def _show_message(part: str, message: Mapping[str, Any]) -> None:
    for kind in ("figure", "note"):
        if kind in message:
            print(f"{part}: {message[kind]}", flush=True)


def _show_tables(content: Mapping[str, Any]) -> None:
    machine = content["machine"]
    conditions = f"{machine['device']}, jax {machine['jax']}, commit {content['commit']}, {content['date']}"
    for name, entry in content["parts"].items():
        if entry["figures"]:
            _show_figures(f"{name}: {PARTS[name].summary}", entry["figures"])
        for note in entry["notes"]:
            print(f"{name}: {note}")
    if content["ratios"]:
        _show_figures("tokens per second, ours over those of transformers", content["ratios"])
    compared = content["parts"].get("parity", {}).get("figures", [])
    differing = [figure for figure in compared if not figure["agrees"]]
    if differing:
        _show_figures(f"{len(differing)} of {len(compared)} results differ from the reference", differing)
    rows = [
        [name, entry["status"], entry["seconds"], entry["limit_seconds"], len(entry["figures"]), len(entry["notes"])]
        for name, entry in content["parts"].items()
    ]
    table(f"bench device: {conditions}", ["part", "status", "seconds", "limit", "figures", "notes"], rows)
    if content["sizes"] == "tiny":
        print("Sizes were tiny: these figures say nothing about the device.")


def _show_figures(title: str, figures: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for figure in figures for name in figure))
    rows = [[_cell(figure.get(name)) for name in columns] for figure in figures]
    table(title, columns, rows)


def _cell(value: Any) -> Any:
    """Return what a table shows: nothing for what was not measured, and the beginning of a long text."""
    if value is None:
        return ""
    return value[:_CELL_WIDTH] if isinstance(value, str) else value
