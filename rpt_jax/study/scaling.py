"""Accuracy against compute over independent runs of several budgets: the paper's power law beside the sigmoid of ScaleRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from rpt_jax.evaluation.statistics import CONFIDENCE
from rpt_jax.infra.scaling_laws import (
    ACCURACY_BOUNDS,
    ALPHA_BOUNDS,
    EXPONENT_BOUNDS,
    LEAST_POINTS,
    NotDetermined,
    PowerLaw,
    Sigmoid,
    fit_power_law,
    fit_sigmoid,
    midpoint_bounds,
    power_law_grid_fits,
    sigmoid_grid_fits,
)
from rpt_jax.study.comparison import outcomes_of, score_names
from rpt_jax.study.outcome import StudyOutcomes

RESAMPLES = 500
# How the parameters of the laws are written.
PARAMETERS = {
    "alpha": "α",
    "p_star": "P*",
    "ceiling": "A",
    "midpoint": "C_mid",
    "exponent": "B",
    "r_squared": "R²",
}


@dataclasses.dataclass(frozen=True)
class Points:
    """One score of the runs of one arm.

    Attributes:
      flops_N: really spent by each run.
      accuracy_N: as fractions.
      budget_N: the budget of each run.
      start: the score of the arm without training, averaged over seeds; None if the study has none.
    """

    flops_N: np.ndarray
    accuracy_N: np.ndarray
    budget_N: np.ndarray
    start: float | None


@dataclasses.dataclass(frozen=True)
class Fit:
    """A curve through the runs of an arm.

    Attributes:
      law: the least-squares fit, or why the runs do not determine it.
      intervals: 95 % bootstrap interval (low, high) by name of the attribute of `law`; empty if there are none.
      no_interval: "" if there are intervals, else why not.
      left_out_error: root of the mean squared error of predicting the mean accuracy of each budget by a fit to the other
        budgets, as a fraction; None with fewer than `LEAST_POINTS` budgets.
    """

    law: PowerLaw | Sigmoid | NotDetermined
    intervals: Mapping[str, tuple[float, float]]
    no_interval: str
    left_out_error: float | None


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Both curves of one score of one arm."""

    arm: str
    score: str
    points: Points
    power_law: Fit
    sigmoid: Fit


def fit_scaling(study: StudyOutcomes) -> list[Scaling]:
    """Fit every score of every arm that has a budget, by score and then by arm.

    Nothing is fitted if the study has fewer than `LEAST_POINTS` budgets.
    """
    fits: list[Scaling] = []
    if len(study.budgets()) < LEAST_POINTS:
        return fits
    for score in score_names(study.outcomes):
        for arm in study.arms:
            points = points_of(study, arm.name, score)
            if points is not None:
                power_law, sigmoid = fit_points(points)
                fits.append(Scaling(arm.name, score, points, power_law, sigmoid))
    return fits


def points_of(study: StudyOutcomes, arm: str, score: str) -> Points | None:
    """Return the runs of an arm that have a budget and the score; None if there are none."""
    runs = [
        (outcome.flops, outcome.scores[score].value, outcome.budget)
        for outcome in study.outcomes
        if outcome.arm == arm and outcome.budget is not None and score in outcome.scores
    ]
    if not runs:
        return None
    flops_N, accuracy_N, budget_N = np.array(runs, dtype=np.float64).T
    return Points(flops_N, accuracy_N, budget_N, _start(study, score))


def _start(study: StudyOutcomes, score: str) -> float | None:
    """Return the mean score of the first arm without a budget, reference arms first."""
    for arm in (*study.references, *(arm.name for arm in study.arms)):
        values = [outcome.scores[score].value for outcome in outcomes_of(study, arm, None) if score in outcome.scores]
        if values:
            return float(np.mean(values))
    return None


def fit_points(points: Points, resamples: int = RESAMPLES) -> tuple[Fit, Fit]:
    """Return the power law and the sigmoid through the runs of an arm.

    Both have three free parameters: R_0 of the sigmoid is the score without training. Beside the conditions of `fit_power_law`,
    the runs must have `LEAST_POINTS` budgets, and the bootstrap interval of no parameter may reach a bound of the fit.

    The bootstrap resamples seeds within budgets. Of the n seeds of a budget it draws n - 1, with replacement: the mean of n
    draws would vary less than that of n runs, by the factor (n - 1) / n (McCarthy and Snowden, 1985).
    """
    power_law = _fit(_PowerLawCurve(points), points, resamples)
    if points.start is None:
        no_start = NotDetermined("the study has no arm without training, whose score is R_0")
        return power_law, Fit(no_start, {}, no_start.reason, None)
    return power_law, _fit(_SigmoidCurve(points, points.start), points, resamples)


# --- the two curves -----------------------------------------------------------------------------------


class _Curve(Protocol):
    """A kind of curve with three parameters, fitted to some points.

    Attributes:
      bounds: of the parameters that have an interval, by name of the attribute of the law.
    """

    bounds: Mapping[str, tuple[float, float]]

    def fit(self) -> PowerLaw | Sigmoid | NotDetermined:
        """Return the least-squares fit."""
        ...

    def weighted_fits(self, weights_RxN: np.ndarray) -> list[PowerLaw | Sigmoid]:
        """Return the fit for each row of weights, with a weighted R²."""
        ...


class _PowerLawCurve:
    bounds: Mapping[str, tuple[float, float]]

    def __init__(self, points: Points) -> None:
        self._points = points
        self.bounds = {"alpha": ALPHA_BOUNDS, "p_star": ACCURACY_BOUNDS}

    def fit(self) -> PowerLaw | NotDetermined:
        return fit_power_law(self._points.flops_N.tolist(), self._points.accuracy_N.tolist())

    def weighted_fits(self, weights_RxN: np.ndarray) -> list[PowerLaw | Sigmoid]:
        fits_Rx3 = power_law_grid_fits(self._points.flops_N, self._points.accuracy_N, weights_RxN)
        laws = [PowerLaw(A=a, alpha=alpha, p_star=p_star, r_squared=0.0) for a, alpha, p_star in fits_Rx3.tolist()]
        return [_with_r_squared(law, self._points, w_N) for law, w_N in zip(laws, weights_RxN, strict=True)]


class _SigmoidCurve:
    bounds: Mapping[str, tuple[float, float]]

    def __init__(self, points: Points, start: float) -> None:
        self._points = points
        self._start = start
        self.bounds = {
            "ceiling": ACCURACY_BOUNDS,
            "midpoint": midpoint_bounds(points.flops_N),
            "exponent": EXPONENT_BOUNDS,
        }

    def fit(self) -> Sigmoid | NotDetermined:
        return fit_sigmoid(self._points.flops_N.tolist(), self._points.accuracy_N.tolist(), self._start)

    def weighted_fits(self, weights_RxN: np.ndarray) -> list[PowerLaw | Sigmoid]:
        fits_Rx3 = sigmoid_grid_fits(self._points.flops_N, self._points.accuracy_N, self._start, weights_RxN)
        laws = [
            Sigmoid(start=self._start, ceiling=ceiling, midpoint=midpoint, exponent=exponent, r_squared=0.0)
            for ceiling, midpoint, exponent in fits_Rx3.tolist()
        ]
        return [_with_r_squared(law, self._points, w_N) for law, w_N in zip(laws, weights_RxN, strict=True)]


def _with_r_squared(law: PowerLaw | Sigmoid, points: Points, weights_N: np.ndarray) -> PowerLaw | Sigmoid:
    mean = np.average(points.accuracy_N, weights=weights_N)
    residual = weights_N @ (law(points.flops_N) - points.accuracy_N) ** 2
    total = weights_N @ (points.accuracy_N - mean) ** 2
    return dataclasses.replace(law, r_squared=1.0 - float(residual / total) if total > 0 else 0.0)


# --- intervals and errors -----------------------------------------------------------------------------


def _fit(curve: _Curve, points: Points, resamples: int) -> Fit:
    budgets = np.unique(points.budget_N)
    if len(budgets) < LEAST_POINTS:
        reason = f"runs of {len(budgets)} of the at least {LEAST_POINTS} budgets that three parameters need"
        return Fit(NotDetermined(reason), {}, reason, None)
    left_out_error = _left_out_error(curve, points)
    law = curve.fit()
    if isinstance(law, NotDetermined):
        return Fit(law, {}, law.reason, left_out_error)
    weights_RxN = _bootstrap_weights(points.budget_N, resamples)
    if weights_RxN is None:
        return Fit(law, {}, "a budget has a single seed", left_out_error)
    resampled = curve.weighted_fits(weights_RxN)
    intervals = {
        name: _percentiles(np.array([getattr(law, name) for law in resampled])) for name in (*curve.bounds, "r_squared")
    }
    at_bound = [
        name
        for name, (lower, upper) in curve.bounds.items()
        # A grid ends on the bounds up to rounding.
        if intervals[name][0] <= lower + 1e-9 * upper or intervals[name][1] >= upper * (1 - 1e-9)
    ]
    if at_bound:
        reason = f"the bootstrap interval of {PARAMETERS[at_bound[0]]} reaches a bound of the fit"
        return Fit(NotDetermined(reason), {}, reason, left_out_error)
    return Fit(law, intervals, "", left_out_error)


def _bootstrap_weights(budget_N: np.ndarray, resamples: int) -> np.ndarray | None:
    """Return how often each run is drawn, scaled so that the weights of a budget add up to its seeds, float [R, N].

    None if a budget has a single seed, whose spread is unknown.
    """
    rng = np.random.default_rng(0)
    weights_RxN = np.empty((resamples, len(budget_N)))
    for budget in np.unique(budget_N):
        of_budget_N = budget_N == budget
        seeds = int(of_budget_N.sum())
        if seeds < 2:
            return None
        drawn_RxK = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples)
        weights_RxN[:, of_budget_N] = drawn_RxK * seeds / (seeds - 1)
    return weights_RxN


def _left_out_error(curve: _Curve, points: Points) -> float:
    """Return the error of predicting the mean of each budget from the others; see `Fit`."""
    budgets_B = np.unique(points.budget_N)
    in_budget_BxN = points.budget_N == budgets_B[:, None]
    fits = curve.weighted_fits((~in_budget_BxN).astype(np.float64))
    errors = [
        np.mean(law(points.flops_N[in_budget_N])) - np.mean(points.accuracy_N[in_budget_N])
        for law, in_budget_N in zip(fits, in_budget_BxN, strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(errors))))


def _percentiles(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)
