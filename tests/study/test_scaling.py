"""Fits over independent runs of several budgets: known curves are recovered, and what is not determined has a reason."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.infra.scaling_laws import NotDetermined, PowerLaw, Sigmoid
from rpt_jax.study.outcome import Outcome
from rpt_jax.study.scaling import Points, fit_points, fit_scaling
from tests.helpers.study import outcome, study

BUDGETS = 1e12 * 2.0 ** np.arange(6)
NOISE_BxS = np.random.default_rng(0).normal(size=(6, 4))


def power_law(flops: np.ndarray) -> np.ndarray:
    return 0.6 - 0.4 * (flops / 1e12) ** -0.6


def points(accuracy_B: np.ndarray, noise: float, seeds: int = 4, start: float | None = 0.1) -> Points:
    """Return runs of several seeds around an accuracy for each budget."""
    budget_BxS = np.repeat(BUDGETS[: len(accuracy_B), None], seeds, axis=1)
    accuracy_BxS = accuracy_B[:, None] + noise * NOISE_BxS[: len(accuracy_B), :seeds]
    return Points(budget_BxS.ravel(), accuracy_BxS.ravel(), budget_BxS.ravel(), start)


def test_a_power_law_is_recovered_with_intervals_around_it() -> None:
    fit, _ = fit_points(points(power_law(BUDGETS), noise=0.004), resamples=200)
    assert isinstance(fit.law, PowerLaw)
    assert fit.law.alpha == pytest.approx(0.6, abs=0.1)
    assert fit.law.p_star == pytest.approx(0.6, abs=0.03)
    for name, true in (("alpha", 0.6), ("p_star", 0.6)):
        low, high = fit.intervals[name]
        assert low < true < high
        assert low < getattr(fit.law, name) < high
    assert 0.9 < fit.intervals["r_squared"][0] <= fit.intervals["r_squared"][1] <= 1.0


def test_a_sigmoid_is_recovered_with_intervals_around_it() -> None:
    true = Sigmoid(0.1, 0.7, 5e12, 1.5, 1.0)
    _, fit = fit_points(points(true(BUDGETS), noise=0.004), resamples=200)
    assert isinstance(fit.law, Sigmoid)
    assert fit.law.start == 0.1
    for name in ("ceiling", "midpoint", "exponent"):
        assert getattr(fit.law, name) == pytest.approx(getattr(true, name), rel=0.05)
        low, high = fit.intervals[name]
        assert low < getattr(fit.law, name) < high


def test_the_true_curve_predicts_left_out_budgets_better() -> None:
    from_power_law = fit_points(points(power_law(BUDGETS), noise=0.0), resamples=10)
    sigmoid = Sigmoid(0.1, 0.7, 6e12, 3.0, 1.0)
    from_sigmoid = fit_points(points(sigmoid(BUDGETS), noise=0.0), resamples=10)
    errors = [fit.left_out_error for fits in (from_power_law, from_sigmoid) for fit in fits]
    assert None not in errors
    assert errors[0] < 0.002 < errors[1]
    assert errors[3] < 0.01 < errors[2]


def test_the_error_on_left_out_budgets_is_that_of_fits_to_the_others() -> None:
    several = points(power_law(BUDGETS), noise=0.01)
    fit, _ = fit_points(several, resamples=10)
    errors = []
    for budget in BUDGETS:
        others_N = several.budget_N != budget
        alone = Points(several.flops_N[others_N], several.accuracy_N[others_N], several.budget_N[others_N], None)
        law = fit_points(alone, resamples=10)[0].law
        assert isinstance(law, PowerLaw)
        errors.append(float(law(np.array(budget))) - several.accuracy_N[~others_N].mean())
    assert fit.left_out_error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.05)


@pytest.mark.parametrize(
    ("accuracy_B", "noise"),
    [
        pytest.param(np.full(6, 0.3), 0.02, id="noise"),
        pytest.param(0.3 + 0.03 * np.arange(6), 0.003, id="a straight line has no ceiling"),
        pytest.param(0.3 + 0.01 * np.arange(6) ** 1.5, 0.003, id="an acceleration has no ceiling"),
        pytest.param(power_law(BUDGETS), 0.2, id="a curve under much noise"),
        pytest.param(power_law(BUDGETS[:3]), 0.002, id="three budgets"),
    ],
)
def test_runs_that_do_not_determine_a_power_law_have_a_reason(accuracy_B: np.ndarray, noise: float) -> None:
    fit, _ = fit_points(points(accuracy_B, noise), resamples=200)
    assert isinstance(fit.law, NotDetermined)
    assert fit.law.reason and fit.no_interval and not fit.intervals


def test_budgets_are_counted_and_not_the_flops_of_each_seed() -> None:
    several = points(power_law(BUDGETS[:3]), 0.001)
    spread = several.flops_N * np.linspace(0.99, 1.01, len(several.flops_N))
    for fit in fit_points(Points(spread, several.accuracy_N, several.budget_N, 0.1), resamples=10):
        assert isinstance(fit.law, NotDetermined)
        assert fit.left_out_error is None


def test_a_budget_with_one_seed_has_a_fit_without_intervals() -> None:
    fit, _ = fit_points(points(power_law(BUDGETS), 0.002, seeds=1), resamples=10)
    assert isinstance(fit.law, PowerLaw)
    assert not fit.intervals and fit.no_interval


def test_a_sigmoid_needs_an_arm_without_training() -> None:
    fit, sigmoid = fit_points(points(power_law(BUDGETS), 0.002, start=None), resamples=10)
    assert isinstance(fit.law, PowerLaw)
    assert isinstance(sigmoid.law, NotDetermined)


def test_each_score_of_each_arm_with_a_budget_is_fitted_from_what_was_really_spent() -> None:
    def runs(arm: str) -> list[Outcome]:
        values = 2 * list(zip(BUDGETS, power_law(BUDGETS), strict=True))
        return [outcome(arm, i, budget, p, direct__hard=p / 2) for i, (budget, p) in enumerate(values)]

    base = [outcome("base", 0, None, 0.1, direct__hard=0.2), outcome("base", 1, None, 0.14, direct__hard=0.2)]
    fits = fit_scaling(study([*base, *runs("rpt"), *runs("ntp")], ("base", "rpt", "ntp")))
    assert [(fit.score, fit.arm) for fit in fits] == [
        (score, arm) for score in ("reasoning/hard", "direct/hard") for arm in ("rpt", "ntp")
    ]
    assert [fit.points.start for fit in fits] == pytest.approx([0.12, 0.12, 0.2, 0.2])
    assert fits[2].points.accuracy_N.tolist() == (np.tile(power_law(BUDGETS), 2) / 2).tolist()
    law = fits[0].power_law.law
    assert isinstance(law, PowerLaw) and law.alpha == pytest.approx(0.6, rel=1e-4)


def test_a_study_of_few_budgets_is_not_fitted() -> None:
    runs = [outcome("rpt", 0, budget, p) for budget, p in zip(BUDGETS[:3], power_law(BUDGETS[:3]), strict=True)]
    assert fit_scaling(study(runs)) == []
