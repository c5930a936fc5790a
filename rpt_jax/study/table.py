"""The tables of a study, on the console and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rpt_jax.infra.console import table
from rpt_jax.infra.scaling_laws import NotDetermined
from rpt_jax.study.comparison import Row, measured_contrasts, score_groups
from rpt_jax.study.formatting import (
    budget_text,
    contrast_title,
    difference_text,
    number,
    percent,
    score_title,
    seeds_text,
    spread_text,
    title_in_group,
)
from rpt_jax.study.limits import headline, limits
from rpt_jax.study.outcome import StudyOutcomes
from rpt_jax.study.scaling import PARAMETERS, Fit, Scaling

_NONE = "–"


class Table(NamedTuple):
    """A title, headings, and rows of as many cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def show_tables(study: StudyOutcomes, rows: Sequence[Row], fits: Sequence[Scaling]) -> None:
    """Print the tables of a study."""
    for each in study_tables(study, rows, fits):
        table(each.title, each.columns, each.rows)


def markdown(study: StudyOutcomes, rows: Sequence[Row], fits: Sequence[Scaling]) -> str:
    """Return the study as Markdown, to paste into a document."""
    parts = [f"# {_escape(study.name)}", _escape(study.question), *map(_escape, headline(study, rows))]
    for each in study_tables(study, rows, fits):
        lines = [each.columns, ["---"] * len(each.columns), *each.rows]
        parts.append(f"## {each.title}")
        parts.append("\n".join("| " + " | ".join(map(_escape, cells)) + " |" for cells in lines))
    parts.append("## What this does not show")
    parts.append("\n".join(f"- {_escape(sentence)}" for sentence in limits(study, rows)))
    parts.append("## Commands")
    parts.append("\n".join(f"    {line}" for command in study.commands for line in command.splitlines()))
    parts.append(
        f"rpt_jax {study.version}, commit {study.commit or 'unknown'}. "
        f"The units ran on {_escape(study.devices())}, with commits: {_escape(study.commits())}."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def study_tables(study: StudyOutcomes, rows: Sequence[Row], fits: Sequence[Scaling]) -> list[Table]:
    """Return the tables of a study; those without rows are left out."""
    tables = []
    for group, names in score_groups(study.outcomes).items():
        title = group.replace("_", " ").capitalize()
        tables.append(_scores_table(study, rows, title, names))
        tables += [_differences_table(study, rows, reference, title, names) for reference in study.references]
    tables += [
        _contrasts_table(study, rows),
        _compute_table(study, rows),
        scaling_table(fits),
        _failures_table(study),
        _missing_table(study),
    ]
    return [each for each in tables if each.rows]


def _scores_table(study: StudyOutcomes, rows: Sequence[Row], title: str, names: Sequence[str]) -> Table:
    cells = [
        [
            row.arm,
            budget_text(row.budget, study.matched_by),
            *(spread_text(row.scores[name]) if name in row.scores else _NONE for name in names),
        ]
        for row in rows
        if any(name in row.scores for name in names)
    ]
    title = f"{title} (%, mean ± standard deviation over seeds, number of seeds)"
    return Table(title, ["arm", "budget", *map(title_in_group, names)], cells)


def _differences_table(
    study: StudyOutcomes, rows: Sequence[Row], reference: str, title: str, names: Sequence[str]
) -> Table:
    cells = [
        [
            row.arm,
            budget_text(row.budget, study.matched_by),
            *(
                difference_text(row.differences[name][reference])
                if reference in row.differences.get(name, {})
                else _NONE
                for name in names
            ),
        ]
        for row in rows
        if any(reference in row.differences.get(name, {}) for name in names)
    ]
    title = f"{title}, minus {reference} (points, mean and 95 % interval over seeds)"
    return Table(title, ["arm", "budget", *map(title_in_group, names)], cells)


def _contrasts_table(study: StudyOutcomes, rows: Sequence[Row]) -> Table:
    contrasts = measured_contrasts(study, rows)
    cells = [
        [
            row.arm,
            budget_text(row.budget, study.matched_by),
            *(
                difference_text(row.contrasts[contrast]) if contrast in row.contrasts else _NONE
                for contrast in contrasts
            ),
        ]
        for row in rows
        if row.contrasts
    ]
    title = "Within an arm (points, mean and 95 % interval over seeds)"
    return Table(title, ["arm", "budget", *map(contrast_title, contrasts)], cells)


def _compute_table(study: StudyOutcomes, rows: Sequence[Row]) -> Table:
    cells = [
        [
            row.arm,
            budget_text(row.budget, study.matched_by),
            seeds_text(row),
            *(
                number(spread.mean) if spread else _NONE
                for spread in (row.steps, row.flops, row.seconds, row.tuning_flops, row.tuning_seconds)
            ),
        ]
        for row in rows
    ]
    columns = ["arm", "budget", "seeds", "steps", "FLOPs", "seconds", "FLOPs of tuning", "seconds of tuning"]
    return Table("Compute (mean over seeds)", columns, cells)


def scaling_table(fits: Sequence[Scaling]) -> Table:
    """Return the parameters of the power law and of the sigmoid, or why they are not determined."""
    cells = [
        [each.arm, score_title(each.score), _fit_text(each.power_law), _fit_text(each.sigmoid), _nearer(each)]
        for each in fits
    ]
    title = "Scaling over independent runs: P(C) = A / C^α + P*, and the sigmoid R_0 + (A − R_0) / (1 + (C_mid / C)^B)"
    return Table(title, ["arm", "score", "power law", "sigmoid", "nearer to left-out budgets"], cells)


def _nearer(scaling: Scaling) -> str:
    """Return which curve has the smaller error on left-out budgets."""
    power_law = scaling.power_law.left_out_error
    sigmoid = scaling.sigmoid.left_out_error
    if power_law is None or sigmoid is None:
        return _NONE
    return "power law" if power_law < sigmoid else "sigmoid"


def _fit_text(fit: Fit) -> str:
    error = "" if fit.left_out_error is None else f"; left-out budgets ± {percent(fit.left_out_error)} points"
    if isinstance(fit.law, NotDetermined):
        return f"not determined: {fit.law.reason}{error}"
    names = [name for name in PARAMETERS if hasattr(fit.law, name)]
    values = [f"{PARAMETERS[name]} = {_parameter(fit, name)}" for name in names]
    return ", ".join(values) + (f" (no intervals: {fit.no_interval})" if fit.no_interval else "") + error


def _parameter(fit: Fit, name: str) -> str:
    value = _value(name, getattr(fit.law, name))
    if name not in fit.intervals:
        return value
    low, high = fit.intervals[name]
    return f"{value} ({_value(name, low)} to {_value(name, high)})"


def _value(name: str, value: float) -> str:
    if name in ("p_star", "ceiling"):
        return f"{percent(value)} %"
    return number(value) if name == "midpoint" else f"{value:.3f}"


def _failures_table(study: StudyOutcomes) -> Table:
    cells = [[str(failure.unit), failure.stage, failure.message, failure.log] for failure in study.failures]
    return Table("Failures", ["unit", "stage", "message", "log"], cells)


def _missing_table(study: StudyOutcomes) -> Table:
    return Table("Not finished yet", ["unit"], [[str(unit)] for unit in study.missing])


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(text.split()))
