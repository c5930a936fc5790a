"""The page of a study: `study.html`, one file that opens from disk, and `study.md`, the same tables to paste."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import jinja2

from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.scaling_laws import LEAST_POINTS, NotDetermined
from rpt_jax.study import figures
from rpt_jax.study.comparison import Row, compare_arms, score_groups
from rpt_jax.study.formatting import budget_text, number, percent, points, score_title, seeds_text, title_in_group
from rpt_jax.study.limits import headline, limits
from rpt_jax.study.outcome import StudyOutcomes
from rpt_jax.study.scaling import Scaling, fit_scaling
from rpt_jax.study.table import markdown, scaling_table, show_tables

PAGE = "study.html"
MARKDOWN = "study.md"
_TEMPLATE = "page.html.jinja"


class Figure(NamedTuple):
    """A figure as SVG, which contains no text of the user."""

    title: str
    svg: str


def write_page(study: StudyOutcomes, directory: Path) -> list[Path]:
    """Print the tables of a study, write `study.html` and `study.md` to an existing directory, and return their paths."""
    rows = compare_arms(study)
    fits = fit_scaling(study)
    show_tables(study, rows, fits)
    atomic_write(directory / MARKDOWN, markdown(study, rows, fits))
    atomic_write(directory / PAGE, render(study, rows, fits))
    return [directory / PAGE, directory / MARKDOWN]


def render(study: StudyOutcomes, rows: list[Row], fits: list[Scaling]) -> str:
    """Return `study.html`. All text but that of the figures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (budget_text, number, percent, points, score_title, title_in_group, seeds_text)
    environment.filters |= {function.__name__: function for function in filters}
    groups = score_groups(study.outcomes)
    return environment.get_template(_TEMPLATE).render(
        study=study,
        headline=headline(study, rows),
        rows_by_budget=[(budget, list(group)) for budget, group in itertools.groupby(rows, key=lambda row: row.budget)],
        score_groups=groups,
        looks=figures.looks(study),
        score_figures=[
            Figure(score_title(score), figures.score_figure(study, rows, score))
            for scores in groups.values()
            for score in scores
        ],
        gain_figure=figures.gain_figure(study, rows) if any(row.gain for row in rows) else None,
        scaling=scaling_table(fits),
        scaling_figures=_scaling_figures(study, fits),
        least_budgets=LEAST_POINTS,
        limits=limits(study, rows),
    )


def _scaling_figures(study: StudyOutcomes, fits: list[Scaling]) -> list[Figure]:
    """Return a figure for each score of which an arm determines a curve."""
    shown = []
    for score, group in itertools.groupby(fits, key=lambda each: each.score):
        of_score = list(group)
        laws = [fit.law for each in of_score for fit in (each.power_law, each.sigmoid)]
        if not all(isinstance(law, NotDetermined) for law in laws):
            shown.append(Figure(score_title(score), figures.scaling_figure(study, of_score)))
    return shown
