"""The figures of a study show the numbers of its tables, also for arms with unusual names."""

from __future__ import annotations

import dataclasses
import io
import warnings

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest
from matplotlib.axes import Axes

from rpt_jax.study import figures
from rpt_jax.study.comparison import compare_arms
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, GAIN
from tests.helpers.study import DURING_TUNING, SCORES, large_study, outcome, study

STUDY = large_study(("base", "rpt", "ntp"), budgets=2, seeds=3)
ROWS = compare_arms(STUDY)


def axes_of(figure: figures.Figure) -> Axes:
    axes = matplotlib.figure.Figure().subplots()
    figure.draw(axes)
    return axes


def marked_points(figure: figures.Figure) -> list[float]:
    """Return the y values of all marks that no line joins."""
    lines = [line for line in axes_of(figure).lines if line.get_linestyle() == "None"]
    return sorted(float(y) for line in lines for y in np.asarray(line.get_ydata()))


@pytest.mark.parametrize("score", SCORES)
def test_a_score_has_a_point_for_each_run(score: str) -> None:
    expected = sorted(100 * each.scores[score].value for each in STUDY.outcomes)
    np.testing.assert_allclose(marked_points(figures.score_figure(STUDY, ROWS, score)), expected)


def test_a_contrast_has_a_point_for_each_run_beside_the_mean() -> None:
    runs = [100 * (each.scores[AFTER_TUNING].value - each.scores[BEFORE_TUNING].value) for each in STUDY.outcomes]
    figure = figures.contrast_figure(STUDY, ROWS, GAIN)
    np.testing.assert_allclose(marked_points(figure), sorted(runs))
    means = [line.get_ydata()[0] for line in axes_of(figure).lines if line.get_markersize() == 7]
    np.testing.assert_allclose(means, [100 * row.contrasts[GAIN].mean for row in ROWS])


def test_fine_tuning_has_a_curve_for_each_arm_at_each_budget() -> None:
    drawn = figures.tuning_figures(STUDY, ROWS)
    for figure, budget in zip(drawn, (1e12, 1e12, 2e12, 2e12), strict=True):
        curves = [line for line in axes_of(figure).lines if line.get_marker() != "None"]
        shown = [row for row in ROWS if row.budget in (None, budget)]
        assert len(curves) == len(shown) == 3
        for curve, row in zip(curves, shown, strict=True):
            # Fine-tuning spends 1e11 FLOPs in 40 steps.
            assert row.flops
            by_flops = [row.flops.mean + flops for flops in (0, 5e10, 1e11)]
            x = by_flops if figure.title.endswith("by FLOPs") else [0, 20, 40]
            np.testing.assert_allclose(curve.get_xdata(), x)
            means = [100 * row.scores[name].mean for name in (BEFORE_TUNING, DURING_TUNING, AFTER_TUNING)]
            np.testing.assert_allclose(curve.get_ydata(), means)


def test_without_the_number_of_steps_there_is_no_curve() -> None:
    """As in a `results.json` of before the number was kept."""
    of = dataclasses.replace(STUDY, outcomes=tuple(dataclasses.replace(o, tuning_steps=0) for o in STUDY.outcomes))
    assert figures.tuning_figures(of, compare_arms(of)) == []


def test_without_evaluations_between_there_is_no_curve() -> None:
    of = study([outcome("rpt", 0, 1e12, 0.5, **{BEFORE_TUNING: 0.2, AFTER_TUNING: 0.3})])
    assert figures.tuning_figures(of, compare_arms(of)) == []


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_png_has_all_figures_whatever_an_arm_is_called(number: int) -> None:
    of = large_study(("base", "$\\frac{1$", "_under", "<b>&"), budgets=1, seeds=2)
    panels = [figures.score_figure(of, compare_arms(of), score) for score in SCORES[:number]]
    with warnings.catch_warnings(action="error"):
        content = figures.png(of, panels)
    width, height = PIL.Image.open(io.BytesIO(content)).size
    # Labels that reach beyond the outer panels widen it a little.
    assert width == pytest.approx(480 * min(number, 3), abs=30)
    assert height == pytest.approx(340 * (1 + (number > 3)) + 40, abs=30)
