"""Writes the page of one or several runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.run_page.html import render_html
from rpt_jax.run_page.reading import RunData, read_run

REPORT = "report.html"  # Name of the page in the directory of a run.
_PHASES = ("setup", "data", "rescore", "reshard", "rollout", "reward", "update", "checkpoint", "evaluation")

# Fields that decide which positions or questions an evaluation has, and those of them that do not.
_EVALUATED = ("task", "data.", "questions.", "evaluation.positions", "policy.path")
_NOT_EVALUATED = (
    "data.positions",
    "data.positions_per_window",
    "data.rescore_every_steps",
    "data.rescore_windows",
    "data.workers",
    "data.keep_fraction",
    "data.entropy_threshold",
    "data.score_batch_windows",
    "data.shard",
    "questions.verifier_workers",
)


def write_page(workdirs: Sequence[Path], path: Path) -> Path:
    """Write the page of some runs to `path`, atomically, and return the path. Raises: OSError."""
    atomic_write(path, render_page([read_run(workdir, len(workdirs)) for workdir in workdirs]))
    return path


def render_page(runs: Sequence[RunData], *, live: bool = False) -> str:
    """Return the page as HTML that needs no other file.

    Args:
      runs: what it shows.
      live: whether it asks its server for a newer version.
    """
    return render_html(
        "page.html",
        "page.js",
        {"live": live, "difficulties": DIFFICULTIES, "runs": [_shown_data(run) for run in runs]},
        title=" and ".join(run.name for run in runs),
        runs=runs,
        differently_evaluated=differently_evaluated(runs),
        headlines=[headline(run) for run in runs],
        config_rows=_config_rows(runs),
        time_rows=_time_rows(runs),
    )


def differently_evaluated(runs: Sequence[RunData]) -> list[str]:
    """Return the config fields by which the evaluations of runs may be of other text, positions or questions."""
    configs = [run.config for run in runs if run.config]
    return [
        name
        for name in sorted({name for config in configs for name in config})
        if name.startswith(_EVALUATED)
        and name not in _NOT_EVALUATED
        and len({json.dumps(config.get(name)) for config in configs}) > 1
    ]


def headline(run: RunData) -> dict[str, Any]:
    """Return the state of a run in a few words, its accuracies and its main result, as the template shows them."""
    total = run.config.get("training.total_steps")
    if run.result:
        state = f"complete, {run.result.get('steps', total)} steps"
    elif run.last_step < 0:
        state = "no step yet"
    else:
        state = f"step {run.last_step} of {total}" if total else f"step {run.last_step}"
    rows = []
    steps: tuple[int, int] | None = None
    names = {"eval/reasoning/": "by reasoning", "eval/direct/": "directly"}
    keys = [(f"{prefix}{level}", f"{level}, {name}") for prefix, name in names.items() for level in DIFFICULTIES]
    keys += [("eval/questions/accuracy", "test questions, mean"), ("eval/questions/pass", "test questions, any sample")]
    for key, label in keys:
        if evaluated := run.first_and_last(key):
            steps = steps or (evaluated[0][0], evaluated[1][0])
            cells = [_interval(run, key, index) for index in (0, -1)]
            rows.append(
                {"label": label, "before": cells[0], "after": cells[1] if evaluated[1][0] > evaluated[0][0] else ""}
            )
    best = next((row for row in rows if row["label"] in ("hard, by reasoning", "test questions, mean")), None)
    return {"state": state, "rows": rows, "best": best, "steps": steps}


def _interval(run: RunData, key: str, index: int) -> str:
    """Return an accuracy in percent with its 95 % interval."""
    ends = [run.metrics.get(f"{key}/{end}", ([], []))[1] for end in ("low", "high")]
    value = f"{100 * run.metrics[key][1][index]:.1f} %"
    if all(ends):
        value += f" ({100 * ends[0][index]:.1f}–{100 * ends[1][index]:.1f})"
    return value


def _config_rows(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the config fields of all runs with their values, and which differ from the default or between runs."""
    rows = []
    for name in sorted({name for run in runs for name in run.config}):
        values = [json.dumps(run.config[name]) if name in run.config else "" for run in runs]
        rows.append(
            {
                "name": name,
                "values": values,
                "changed": any(name in run.changed for run in runs),
                "differs": len(set(values)) > 1,
            }
        )
    return rows


def _time_rows(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the seconds and the fraction of each phase in every run."""
    totals = [{phase: sum(run.metrics.get(f"time/{phase}", ([], []))[1]) for phase in _PHASES} for run in runs]
    rows = []
    for phase in _PHASES:
        cells = [
            f"{total[phase]:,.0f} s ({total[phase] / (sum(total.values()) or 1):.0%})" if total[phase] else ""
            for total in totals
        ]
        if any(cells):
            rows.append({"phase": phase, "cells": cells})
    return rows


def _shown_data(run: RunData) -> dict[str, Any]:
    """Return what the page's script shows of a run."""
    fields = ("name", "metrics", "fits", "groups", "windows")
    return {name: value for name, value in dataclasses.asdict(run).items() if name in fields}
