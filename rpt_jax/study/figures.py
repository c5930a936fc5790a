"""The figures of a study's page, as SVG that takes the colors of text and grid from the page.

Names of arms are not drawn: the page has one legend for all figures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rpt_jax.infra.plots import DASHES, STYLE
from rpt_jax.infra.scaling_laws import NotDetermined
from rpt_jax.study.comparison import Row, Spread
from rpt_jax.study.formatting import number
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, StudyOutcomes
from rpt_jax.study.scaling import Scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Readable on white and on black. The eight colors with the nine markers give 72 arms a look of their own.
_COLORS = ("#3B82C4", "#D9822B", "#C4457C", "#2E9E6B", "#8E6BD1", "#B08900", "#3D9BA3", "#868686")
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶"}
# Stand for the colors of the page until the figure is finished.
_TEXT = "#010203"
_GRID = "#010204"
_STYLE: dict[Any, Any] = STYLE | {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "lines.linewidth": 1.5,
}


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


def looks(study: StudyOutcomes) -> dict[str, Look]:
    """Return how each arm is drawn, by its name."""
    markers = list(_MARKERS.items())
    return {arm.name: Look(_COLORS[i % len(_COLORS)], *markers[i % len(markers)]) for i, arm in enumerate(study.arms)}


def score_figure(study: StudyOutcomes, rows: Sequence[Row], score: str) -> str:
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
        _finish(axes, study)

    return _svg(draw, f"scores {score}")


def scaling_figure(study: StudyOutcomes, fits: Sequence[Scaling]) -> str:
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
        _finish(axes, study)

    return _svg(draw, f"scaling {fits[0].score}")


def gain_figure(study: StudyOutcomes, rows: Sequence[Row]) -> str:
    """Return what fine-tuning adds, in points: a dot for each seed, and the mean with its interval, by budget and arm."""
    look = looks(study)
    tuned = [row for row in rows if row.gain]
    budgets = sorted({row.budget or 0.0 for row in tuned})

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=_TEXT, linewidth=1)
        for i, budget in enumerate(budgets):
            of_budget = [row for row in tuned if (row.budget or 0.0) == budget]
            for k, row in enumerate(of_budget):
                x = i + 0.8 * ((k + 0.5) / len(of_budget) - 0.5)
                _draw_gain(axes, x, row, look[row.arm])
        axes.set_xticks(range(len(budgets)), [number(budget) if budget else "none" for budget in budgets])
        axes.set_xlabel("budget (FLOPs)" if study.matched_by == "flops" else "budget (seconds)")
        axes.set_ylabel("gain (points)")
        axes.grid(visible=False, axis="x")

    return _svg(draw, "gain")


def _draw_gain(axes: Axes, x: float, row: Row, look: Look) -> None:
    assert row.gain is not None
    before = row.scores[BEFORE_TUNING].by_seed
    gains = [100 * (after - before[seed]) for seed, after in row.scores[AFTER_TUNING].by_seed.items() if seed in before]
    axes.plot([x] * len(gains), gains, linestyle="none", marker=".", color=look.color, alpha=0.5)
    mean = 100 * row.gain.mean
    axes.plot([x], [mean], marker=look.marker, color=look.color, markersize=7)
    if row.gain.low is not None and row.gain.high is not None:
        axes.plot([x, x], [100 * row.gain.low, 100 * row.gain.high], color=look.color)


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


def _finish(axes: Axes, study: StudyOutcomes) -> None:
    """Label the axes of accuracy (%) against FLOPs."""
    axes.set_xscale("log")
    if study.matched_by == "flops" and study.budgets():
        axes.set_xticks(study.budgets(), [number(budget) for budget in study.budgets()])
        axes.minorticks_off()
    axes.set_xlabel("FLOPs before tuning")
    axes.set_ylabel("accuracy (%)")


def _svg(draw: Callable[[Axes], None], name: str) -> str:
    """Return a figure as an SVG element without width and height.

    Args:
      draw: draws on the axes.
      name: differs between the figures of a page, so that their ids do.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'^(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'^(<svg [^>]*?) height="[^"]*"', r"\1", svg))
    return svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")
