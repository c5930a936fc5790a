"""The page of a study: `study.html`, one file that opens from disk; `study.md`, the same tables, and `study.png`, to paste."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from pathlib import Path

import jinja2

from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.scaling_laws import LEAST_POINTS, NotDetermined
from rpt_jax.study import figures
from rpt_jax.study.comparison import Row, compare_arms, measured_contrasts, score_groups
from rpt_jax.study.formatting import (
    budget_text,
    contrast_title,
    number,
    percent,
    points,
    score_title,
    seeds_text,
    title_in_group,
)
from rpt_jax.study.limits import headline, limits
from rpt_jax.study.outcome import BEFORE_TUNING, StudyOutcomes
from rpt_jax.study.scaling import Scaling, fit_scaling
from rpt_jax.study.table import markdown, scaling_table, show_tables

PAGE = "study.html"
MARKDOWN = "study.md"
PICTURE = "study.png"
_TEMPLATE = "page.html.jinja"


def write_page(study: StudyOutcomes, directory: Path) -> list[Path]:
    """Print the tables of a study, write its page, its tables and its picture to an existing directory, and return their paths.

    There is no picture if nothing was measured.
    """
    rows = compare_arms(study)
    fits = fit_scaling(study)
    show_tables(study, rows, fits)
    atomic_write(directory / MARKDOWN, markdown(study, rows, fits))
    atomic_write(directory / PAGE, render(study, rows, fits))
    written = [directory / PAGE, directory / MARKDOWN]
    if panels := main_figures(study, rows, fits):
        atomic_write(directory / PICTURE, figures.png(study, panels))
        written.append(directory / PICTURE)
    return written


def render(study: StudyOutcomes, rows: list[Row], fits: list[Scaling]) -> str:
    """Return `study.html`. All text but that of the figures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        budget_text,
        contrast_title,
        number,
        percent,
        points,
        score_title,
        title_in_group,
        seeds_text,
        figures.svg,
    )
    environment.filters |= {function.__name__: function for function in filters}
    groups = score_groups(study.outcomes)
    return environment.get_template(_TEMPLATE).render(
        study=study,
        headline=headline(study, rows),
        rows_by_budget=[(budget, list(group)) for budget, group in itertools.groupby(rows, key=lambda row: row.budget)],
        score_groups=groups,
        looks=figures.looks(study),
        score_figures=[figures.score_figure(study, rows, score) for scores in groups.values() for score in scores],
        tuning_figures=figures.tuning_figures(study, rows),
        contrasts=measured_contrasts(study, rows),
        contrast_figures=_contrast_figures(study, rows),
        scaling=scaling_table(fits),
        scaling_figures=_scaling_figures(study, fits),
        least_budgets=LEAST_POINTS,
        limits=limits(study, rows),
    )


def main_figures(study: StudyOutcomes, rows: Sequence[Row], fits: Sequence[Scaling]) -> list[figures.Figure]:
    """Return the figures that answer most: scores against FLOPs, fine-tuning after one budget, contrasts, and fitted curves."""
    measured = {name for outcome in study.outcomes for name in outcome.scores}
    names = dict.fromkeys([study.main_score, BEFORE_TUNING, "reasoning/easy", "direct/easy"])
    return [
        *(figures.score_figure(study, rows, name) for name in names if name in measured),
        *figures.tuning_figures(study, _with_most_arms(rows)),
        *_contrast_figures(study, rows),
        *_scaling_figures(study, fits),
    ]


def _with_most_arms(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the budget at which most arms were measured, the largest of several, and those without a budget."""
    arms = collections.Counter(row.budget for row in rows if row.budget is not None and row.scores)
    largest = max(arms, key=lambda budget: (arms[budget], budget), default=None)
    return [row for row in rows if row.budget in (None, largest)]


def _contrast_figures(study: StudyOutcomes, rows: Sequence[Row]) -> list[figures.Figure]:
    return [figures.contrast_figure(study, rows, contrast) for contrast in measured_contrasts(study, rows)]


def _scaling_figures(study: StudyOutcomes, fits: Sequence[Scaling]) -> list[figures.Figure]:
    """Return a figure for each score of which an arm determines a curve."""
    shown = []
    for _, group in itertools.groupby(fits, key=lambda each: each.score):
        of_score = list(group)
        laws = [fit.law for each in of_score for fit in (each.power_law, each.sigmoid)]
        if not all(isinstance(law, NotDetermined) for law in laws):
            shown.append(figures.scaling_figure(study, of_score))
    return shown
