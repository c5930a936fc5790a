"""The figures of a study: as SVG that takes the colors of text and grid from the page, and several as one PNG."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rpt_jax.infra.plots import DASHES, STYLE
from rpt_jax.infra.scaling_laws import NotDetermined
from rpt_jax.study.comparison import Row, Spread
from rpt_jax.study.formatting import budget_text, contrast_title, number, score_title
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, TUNING_STEP, Contrast, StudyOutcomes
from rpt_jax.study.scaling import Scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Readable on white and on black. The eight colors with the nine markers give 72 arms a look of their own.
_COLORS = ("#3B82C4", "#D9822B", "#C4457C", "#2E9E6B", "#8E6BD1", "#B08900", "#3D9BA3", "#868686")
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶"}
# Stand for the colors of the page until the figure is finished.
_TEXT = "#010203"
_GRID = "#010204"
_STYLE: dict[Any, Any] = STYLE | {"font.size": 11, "lines.linewidth": 1.5, "text.parse_math": False}
_PAGE_STYLE: dict[Any, Any] = _STYLE | {
    "svg.fonttype": "none",
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
}
_PANEL_INCHES = (4.8, 3.4)
_PANELS_PER_ROW = 3
_TITLE_CHARACTERS = 44  # That fit above a panel.


class Look(NamedTuple):
    """How an arm is drawn.

    Attributes:
      color: as a CSS color.
      marker: of matplotlib.
      glyph: the character for the marker in the legend.
    """

    color: str
    marker: str
    glyph: str


class Figure(NamedTuple):
    """A figure: its title, and what draws it on axes. Names of arms are not drawn: one legend serves all figures."""

    title: str
    draw: Callable[[Axes], None]


def looks(study: StudyOutcomes) -> dict[str, Look]:
    """Return how each arm is drawn, by its name."""
    markers = list(_MARKERS.items())
    return {arm.name: Look(_COLORS[i % len(_COLORS)], *markers[i % len(markers)]) for i, arm in enumerate(study.arms)}


# --- figures ------------------------------------------------------------------------------------------


def score_figure(study: StudyOutcomes, rows: Sequence[Row], score: str) -> Figure:
    """Return a score against the FLOPs that were spent: a point for each seed, and a line through the means of each arm."""
    look = looks(study)

    def draw(axes: Axes) -> None:
        for arm in study.arms:
            of_arm = [row for row in rows if row.arm == arm.name and score in row.scores and row.flops is not None]
            for row in of_arm:
                if row.budget is None:
                    _draw_without_budget(axes, row.scores[score], look[row.arm])
            trained = [row for row in of_arm if row.budget is not None]
            _draw_runs(axes, trained, score, look[arm.name])
            means = [(row.flops.mean, 100 * row.scores[score].mean) for row in trained if row.flops]
            axes.plot(*np.reshape(means, (-1, 2)).T, color=look[arm.name].color)
        _label_flops(axes, study)

    return Figure(score_title(score), draw)


def scaling_figure(study: StudyOutcomes, fits: Sequence[Scaling]) -> Figure:
    """Return the runs of one score with the power laws (solid) and sigmoids (dashed) that they determine."""
    look = looks(study)

    def draw(axes: Axes) -> None:
        for each in fits:
            style = look[each.arm]
            flops_N = each.points.flops_N
            _points(axes, flops_N, 100 * each.points.accuracy_N, style)
            curve_M = np.geomspace(flops_N.min(), flops_N.max(), 100)
            for fit, dashes in ((each.power_law, "-"), (each.sigmoid, DASHES)):
                if not isinstance(fit.law, NotDetermined):
                    axes.plot(curve_M, 100 * fit.law(curve_M), color=style.color, linestyle=dashes)
        _label_flops(axes, study)

    return Figure(f"scaling of {score_title(fits[0].score)}", draw)


def contrast_figure(study: StudyOutcomes, rows: Sequence[Row], contrast: Contrast) -> Figure:
    """Return a contrast in points: a dot for each seed, and the mean with its interval, by budget and arm."""
    look = looks(study)
    shown = [row for row in rows if contrast in row.contrasts]
    budgets = sorted({row.budget or 0.0 for row in shown})

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=_ink(), linewidth=1)
        for i, budget in enumerate(budgets):
            of_budget = [row for row in shown if (row.budget or 0.0) == budget]
            for k, row in enumerate(of_budget):
                x = i + 0.8 * ((k + 0.5) / len(of_budget) - 0.5)
                _draw_contrast(axes, x, row, contrast, look[row.arm])
        axes.set_xticks(range(len(budgets)), [number(budget) if budget else "none" for budget in budgets])
        axes.set_xlabel("budget (FLOPs)" if study.matched_by == "flops" else "budget (seconds)")
        axes.set_ylabel("difference (points)")
        axes.grid(visible=False, axis="x")

    return Figure(contrast_title(contrast), draw)


def tuning_figures(study: StudyOutcomes, rows: Sequence[Row]) -> list[Figure]:
    """Return the accuracy on questions during fine-tuning, two figures for each budget: means over seeds, their range as bars.

    The first is against the steps of fine-tuning, the second against all FLOPs that were spent, those before fine-tuning too; the
    steps of a run count as equal there. Arms without a budget are in every figure. A budget has none if fine-tuning was not
    evaluated between its ends.
    """
    curves = {(row.arm, row.budget): (row, curve) for row in rows if len(curve := _tuning_curve(row)) > 2}
    budgets = sorted({budget for _, budget in curves if budget is not None}) or ([None] if curves else [])
    figures = []
    for budget in budgets:
        of_budget = [curve for (_, of_arm), curve in curves.items() if of_arm in (None, budget)]
        title = f"questions during tuning, {budget_text(budget, study.matched_by)}"
        figures.append(
            _tuning_figure(study, title, "steps of fine-tuning", [(row.arm, curve) for row, curve in of_budget])
        )
        by_flops = [
            (row.arm, {_all_flops(row, step): spread for step, spread in curve.items()}) for row, curve in of_budget
        ]
        figures.append(_tuning_figure(study, f"{title}, by FLOPs", "all FLOPs, with those of fine-tuning", by_flops))
    return figures


def _tuning_figure(
    study: StudyOutcomes, title: str, label: str, curves: Sequence[tuple[str, Mapping[float, Spread]]]
) -> Figure:
    """Return a figure of accuracies by what `label` says, for each arm."""
    look = looks(study)

    def draw(axes: Axes) -> None:
        for arm, curve in curves:
            for x, spread in curve.items():
                axes.plot([x] * 2, [100 * spread.low, 100 * spread.high], color=look[arm].color, alpha=0.5)
            means = [100 * spread.mean for spread in curve.values()]
            axes.plot(list(curve), means, color=look[arm].color, marker=look[arm].marker, markersize=5)
        # Without it, the power of ten of FLOPs stands beside the axis.
        axes.xaxis.set_major_formatter(lambda x, _: number(x) if x >= 1e5 else f"{x:g}")
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy (%)")

    return Figure(title, draw)


def _all_flops(row: Row, step: float) -> float:
    """Return the FLOPs that an arm has spent after a step of fine-tuning, as the mean over seeds."""
    assert row.flops and row.tuning_flops and row.tuning_steps
    return row.flops.mean + row.tuning_flops.mean * step / row.tuning_steps.mean


def _tuning_curve(row: Row) -> dict[float, Spread]:
    """Return the accuracy on questions by the step of fine-tuning; nothing if its end is unknown."""
    steps = row.tuning_steps.mean if row.tuning_steps else 0
    if BEFORE_TUNING not in row.scores or AFTER_TUNING not in row.scores or not steps:
        return {}
    prefix = TUNING_STEP.format("")
    between = {int(name.removeprefix(prefix)): spread for name, spread in row.scores.items() if name.startswith(prefix)}
    return {0: row.scores[BEFORE_TUNING], **between, steps: row.scores[AFTER_TUNING]}


def _draw_contrast(axes: Axes, x: float, row: Row, contrast: Contrast, look: Look) -> None:
    difference = row.contrasts[contrast]
    others = row.scores[contrast.minus].by_seed
    points = [
        100 * (value - others[seed]) for seed, value in row.scores[contrast.score].by_seed.items() if seed in others
    ]
    axes.plot([x] * len(points), points, linestyle="none", marker=".", color=look.color, alpha=0.5)
    axes.plot([x], [100 * difference.mean], marker=look.marker, color=look.color, markersize=7)
    if difference.low is not None and difference.high is not None:
        axes.plot([x, x], [100 * difference.low, 100 * difference.high], color=look.color)


def _draw_without_budget(axes: Axes, scores: Spread, look: Look) -> None:
    """Draw an arm without training as a line, with its seeds at the left end."""
    axes.axhline(100 * scores.mean, color=look.color, linestyle=DASHES)
    values_S = 100 * np.array(list(scores.by_seed.values()))
    axes.plot(
        np.full(len(values_S), 0.02),
        values_S,
        transform=axes.get_yaxis_transform(),
        linestyle="none",
        marker=look.marker,
        color=look.color,
        markersize=5,
        alpha=0.6,
    )


def _draw_runs(axes: Axes, rows: Sequence[Row], score: str, look: Look) -> None:
    for row in rows:
        seeds = row.scores[score].by_seed
        flops: Mapping[int, float] = row.flops.by_seed if row.flops else {}
        _points(axes, np.array([flops[seed] for seed in seeds]), 100 * np.array(list(seeds.values())), look)


def _points(axes: Axes, x_N: np.ndarray, y_N: np.ndarray, look: Look) -> None:
    axes.plot(x_N, y_N, linestyle="none", marker=look.marker, color=look.color, markersize=5, alpha=0.6)


def _label_flops(axes: Axes, study: StudyOutcomes) -> None:
    """Label the axes of accuracy (%) against FLOPs."""
    axes.set_xscale("log")
    if study.matched_by == "flops" and study.budgets():
        axes.set_xticks(study.budgets(), [number(budget) for budget in study.budgets()])
        axes.minorticks_off()
    axes.set_xlabel("FLOPs before tuning")
    axes.set_ylabel("accuracy (%)")


def _ink() -> str:
    """Return the color of text in the style that is being drawn."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


# --- files --------------------------------------------------------------------------------------------


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element without its title, width and height. Its ids differ from those of other titles."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({**_PAGE_STYLE, "svg.hashsalt": figure.title}):
        canvas = Canvas(figsize=_PANEL_INCHES, layout="constrained")
        figure.draw(canvas.subplots())
        buffer = io.StringIO()
        metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'^(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'^(<svg [^>]*?) height="[^"]*"', r"\1", text))
    return text.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")


def png(study: StudyOutcomes, figures: Sequence[Figure]) -> bytes:
    """Return figures (at least one) on a white background as one PNG, with their titles and a legend of the arms."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(_PANELS_PER_ROW, len(figures))
    rows = -(-len(figures) // columns)
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.4), layout="constrained")
        panels = canvas.subplots(rows, columns, squeeze=False).flat
        for panel, figure in zip(panels, figures, strict=False):
            figure.draw(panel)
            panel.set_title(textwrap.fill(figure.title, _TITLE_CHARACTERS))
        for panel in panels[len(figures) :]:
            panel.set_axis_off()
        marks = [Line2D([], [], color=look.color, marker=look.marker) for look in looks(study).values()]
        canvas.legend(marks, list(looks(study)), loc="outside lower center", ncols=max(1, len(marks)))
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()
