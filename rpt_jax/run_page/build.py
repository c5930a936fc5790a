"""Writes the page of one or several runs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rpt_jax import __version__
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.run_page.reading import RunData, read_run

REPORT = "report.html"  # Name of the page in the directory of a run.
_PHASES = ("setup", "data", "rescore", "reshard", "rollout", "reward", "update", "checkpoint", "evaluation")


def write_page(workdirs: Sequence[Path], path: Path) -> Path:
    """Write the page of some runs to `path`, atomically, and return the path. Raises: OSError."""
    atomic_write(path, render_page([read_run(workdir, len(workdirs)) for workdir in workdirs]))
    return path


def render_page(runs: Sequence[RunData], *, live: bool = False) -> str:
    """Return the page as HTML that needs no other file.

    Everything that comes from a run is escaped by the template, or is JSON that the page's script inserts as text. Besides, the
    page's policy lets the browser run its two scripts only and connect to nothing but the server that it is from.

    Args:
      runs: what it shows.
      live: whether it asks its server for a newer version.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rpt_jax.run_page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), _resource("page.js")]
    page = environment.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        headlines=[headline(run) for run in runs],
        config_rows=_config_rows(runs),
        time_rows=_time_rows(runs),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(_resource("page.css")),
        policy=_content_policy(scripts),
        scripts=[Markup(script) for script in scripts],
        data=Markup(
            _embedded_json({"live": live, "difficulties": DIFFICULTIES, "runs": [_shown_data(run) for run in runs]})
        ),
    )
    return page.encode("utf-8", "backslashreplace").decode()  # JSON can hold what UTF-8 cannot.


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


def _resource(name: str) -> str:
    return (resources.files("rpt_jax.run_page") / "templates" / name).read_text(encoding="utf-8")


def _embedded_json(value: Any) -> str:
    """Return JSON that can stand in a <script> element: without characters that could end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _content_policy(scripts: Sequence[str]) -> str:
    """Return the Content-Security-Policy that allows these scripts, by their digests, and no others."""
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
