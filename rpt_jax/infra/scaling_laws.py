"""Curves of accuracy against training compute, fitted by least squares: the paper's power law and the sigmoid of ScaleRL.

Least squares always returns some curve, even for noise or a straight line. A fit is therefore refused, with the reason, unless
the points determine its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

LEAST_POINTS = 4  # Different amounts of compute: one more than either curve has parameters.
ALPHA_BOUNDS = (1e-2, 5.0)
EXPONENT_BOUNDS = (0.2, 10.0)
MIDPOINT_FACTOR = 10.0  # The midpoint of a sigmoid may be this far outside of the points.
ACCURACY_BOUNDS = (0.0, 1.0)
# Sizes of the grids. Alphas are a factor of 1.01 apart. Exponents are 1.11 and, if the points span a factor of 10, midpoints 1.12
# apart, and 1.02 on the finer grid.
_ALPHAS = 622
_EXPONENTS = 40
_MIDPOINTS = 60
_REFINEMENTS = 13  # An odd number, so that the best of the coarse grid is on the finer one.
_ROWS_AT_ONCE = 100  # Bounds the memory of many fits.


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """P(C) = A / C^alpha + P*, Equation 5 of the paper, with C in FLOPs and P as a fraction; A < 0 if P rises."""

    A: float
    alpha: float
    p_star: float
    r_squared: float

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        return self.A * flops**-self.alpha + self.p_star


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """R(C) = R_0 + (A - R_0) / (1 + (C_mid / C)^B), Equation 1 of ScaleRL (arXiv 2510.13786).

    Attributes:
      start: R_0, the accuracy before training, as a fraction. It is given, not fitted.
      ceiling: A, the accuracy that unlimited compute would reach.
      midpoint: C_mid, the FLOPs at which half of the gain is reached.
      exponent: B, the steepness.
      r_squared: one minus the residual sum of squares over that about the mean.
    """

    start: float
    ceiling: float
    midpoint: float
    exponent: float
    r_squared: float

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        return self.start + (self.ceiling - self.start) * _step(flops, self.midpoint, self.exponent)


@dataclasses.dataclass(frozen=True)
class NotDetermined:
    """The points do not determine a curve.

    Attributes:
      reason: why not.
      closest: the power law with the least squared error, which describes the points and says nothing beyond them; None if there
        are too few points for one, or another curve was to be fitted.
    """

    reason: str
    closest: PowerLaw | None = None


# --- fits ---------------------------------------------------------------------------------------------


def fit_power_law(flops: Sequence[float], accuracy: Sequence[float]) -> PowerLaw | NotDetermined:
    """Fit Equation 5 of the paper by least squares, with P* in [0, 1] and alpha in `ALPHA_BOUNDS`.

    Points of zero FLOPs, such as the evaluation at step 0, are left out: Equation 5 is not defined there. The fit is
    deterministic. The points must determine it: there are `LEAST_POINTS` different FLOPs, neither alpha nor P* lies on a bound,
    and the 95 % interval of alpha does not contain 0.

    Args:
      flops: [N] training compute of each point.
      accuracy: [N] accuracies as fractions.
    """
    c_N, p_N = _trained(flops, accuracy)
    reason = _too_few(c_N, p_N)
    if reason:
        return NotDetermined(reason)
    # Relative to the geometric mean: C^-alpha of 1e20 FLOPs and more would put A and P* on very different scales.
    scale = _geometric_mean(c_N)
    a, alpha, p_star = power_law_grid_fits(c_N / scale, p_N, np.ones((1, len(c_N))))[0]

    def residuals(parameters: np.ndarray) -> np.ndarray:
        a, log_alpha, p_star = parameters
        return a * (c_N / scale) ** -np.exp(log_alpha) + p_star - p_N

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        a, log_alpha, _ = parameters
        power_N = (c_N / scale) ** -np.exp(log_alpha)
        by_log_alpha_N = -a * power_N * np.log(c_N / scale) * np.exp(log_alpha)
        return np.stack([power_N, by_log_alpha_N, np.ones_like(c_N)], axis=1)

    lower = (-np.inf, np.log(ALPHA_BOUNDS[0]), ACCURACY_BOUNDS[0])
    upper = (np.inf, np.log(ALPHA_BOUNDS[1]), ACCURACY_BOUNDS[1])
    best = _least_squares(residuals, jacobian, (a, np.log(alpha), p_star), lower, upper)
    a, log_alpha, p_star = map(float, best.x)
    alpha = float(np.exp(log_alpha))
    law = PowerLaw(A=a * float(scale**alpha), alpha=alpha, p_star=p_star, r_squared=_r_squared(best, p_N))
    reason = _undetermined(best, ("A", "alpha", "P*"), exponent=1)
    return NotDetermined(reason, law) if reason else law


def fit_sigmoid(flops: Sequence[float], accuracy: Sequence[float], start: float) -> Sigmoid | NotDetermined:
    """Fit Equation 1 of ScaleRL by least squares, under the conditions of `fit_power_law`.

    The ceiling is in [0, 1], the exponent in `EXPONENT_BOUNDS`, and the midpoint at most `MIDPOINT_FACTOR` outside of the points.

    Args:
      flops: [N] training compute of each point; points of zero FLOPs are left out.
      accuracy: [N] accuracies as fractions.
      start: accuracy before training, as a fraction.
    """
    c_N, p_N = _trained(flops, accuracy)
    reason = _too_few(c_N, p_N)
    if reason:
        return NotDetermined(reason)
    ceiling, midpoint, exponent = sigmoid_grid_fits(c_N, p_N, start, np.ones((1, len(c_N))))[0]

    def residuals(parameters: np.ndarray) -> np.ndarray:
        ceiling, log_midpoint, log_exponent = parameters
        return start + (ceiling - start) * _step(c_N, np.exp(log_midpoint), np.exp(log_exponent)) - p_N

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        ceiling, log_midpoint, log_exponent = parameters
        exponent = np.exp(log_exponent)
        step_N = _step(c_N, np.exp(log_midpoint), exponent)
        by_logit_N = (ceiling - start) * step_N * (1 - step_N)
        return np.stack([step_N, -by_logit_N * exponent, by_logit_N * exponent * (np.log(c_N) - log_midpoint)], axis=1)

    lower_midpoint, upper_midpoint = midpoint_bounds(c_N)
    lower = (ACCURACY_BOUNDS[0], np.log(lower_midpoint), np.log(EXPONENT_BOUNDS[0]))
    upper = (ACCURACY_BOUNDS[1], np.log(upper_midpoint), np.log(EXPONENT_BOUNDS[1]))
    best = _least_squares(residuals, jacobian, (ceiling, np.log(midpoint), np.log(exponent)), lower, upper)
    reason = _undetermined(best, ("the ceiling", "the midpoint", "the exponent"), exponent=2)
    if reason:
        return NotDetermined(reason)
    return Sigmoid(
        start=start,
        ceiling=float(best.x[0]),
        midpoint=float(np.exp(best.x[1])),
        exponent=float(np.exp(best.x[2])),
        r_squared=_r_squared(best, p_N),
    )


def _trained(flops: Sequence[float], accuracy: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the points with more than zero FLOPs."""
    c_N = np.asarray(flops, dtype=np.float64)
    p_N = np.asarray(accuracy, dtype=np.float64)
    return c_N[c_N > 0], p_N[c_N > 0]


def _too_few(c_N: np.ndarray, p_N: np.ndarray) -> str:
    """Return why no curve can be fitted; "" if one can."""
    found = len(np.unique(c_N))
    if found < LEAST_POINTS:
        return f"{found} different amounts of compute, and three parameters need at least {LEAST_POINTS}"
    return "the accuracy is the same everywhere" if len(np.unique(p_N)) == 1 else ""


def _least_squares(
    residuals: Callable[[np.ndarray], np.ndarray],
    jacobian: Callable[[np.ndarray], np.ndarray],
    start: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
) -> Any:
    """Return scipy's result, from a start near the best fit."""
    return scipy.optimize.least_squares(
        residuals,
        np.clip(start, lower, upper),
        jacobian,  # pyright: ignore[reportArgumentType] - the stubs allow strings only.
        bounds=(lower, upper),
        method="dogbox",  # It reaches the bounds exactly, which an accuracy of 0 or 1 lies on.
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )


def _undetermined(best: Any, names: Sequence[str], exponent: int) -> str:
    """Return why the points do not determine a fit in which parameter number `exponent` is a logarithm; "" if they do."""
    on_bound = [name for name, active in zip(names, best.active_mask, strict=True) if active]
    if on_bound:
        return f"the best fit has {' and '.join(on_bound)} on a bound"
    # The half width of the 95 % interval of the exponent, divided by it, from the linearized fit.
    freedom = len(best.fun) - len(names)
    covariance_3x3 = np.linalg.pinv(best.jac.T @ best.jac) * 2.0 * best.cost / freedom
    relative_error = scipy.special.stdtrit(freedom, 0.975) * np.sqrt(covariance_3x3[exponent, exponent])
    return (
        ""
        if relative_error < 1.0
        else f"the points scatter too much: the 95 % interval of {names[exponent]} contains 0"
    )


def _r_squared(best: Any, p_N: np.ndarray) -> float:
    return 1.0 - 2.0 * float(best.cost) / float(np.sum((p_N - p_N.mean()) ** 2))


def _step(flops: np.ndarray, midpoint: np.ndarray | float, exponent: np.ndarray | float) -> np.ndarray:
    """Return 1 / (1 + (midpoint / flops)^exponent)."""
    return scipy.special.expit(exponent * np.log(flops / midpoint))


def _geometric_mean(c_N: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(c_N))))


def midpoint_bounds(flops_N: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest midpoint of a sigmoid that is fitted to these points."""
    return float(flops_N.min()) / MIDPOINT_FACTOR, float(flops_N.max()) * MIDPOINT_FACTOR


# --- many fits at once, on a grid ---------------------------------------------------------------------


def power_law_grid_fits(flops_N: np.ndarray, accuracy_N: np.ndarray, weights_RxN: np.ndarray) -> np.ndarray:
    """Return A, alpha and P* of the weighted least-squares fit for each row of weights, float [R, 3].

    Alpha is on a grid; A and P* are the exact optimum for it. No condition is checked.

    Args:
      flops_N: more than 0.
      accuracy_N: accuracies as fractions.
      weights_RxN: at least 0.
    """
    scale = _geometric_mean(flops_N)
    alpha_K = np.geomspace(*ALPHA_BOUNDS, _ALPHAS)
    power_KxN = (flops_N / scale) ** -alpha_K[:, None]
    # Weighted sums of w, f, f^2, f p and p, with f the power and p the accuracy.
    w_Rx1 = weights_RxN.sum(axis=1, keepdims=True)
    f_RxK = weights_RxN @ power_KxN.T
    ff_RxK = weights_RxN @ (power_KxN**2).T
    fp_RxK = (weights_RxN * accuracy_N) @ power_KxN.T
    p_Rx1 = (weights_RxN @ accuracy_N)[:, None]
    # The error is quadratic in A and P*, so the best P* within its bounds is the free one, clipped.
    p_star_RxK = np.clip((p_Rx1 * ff_RxK - f_RxK * fp_RxK) / (w_Rx1 * ff_RxK - f_RxK**2), *ACCURACY_BOUNDS)
    a_RxK = (fp_RxK - p_star_RxK * f_RxK) / ff_RxK
    # Up to the sum of w p^2, which is the same for all alphas.
    error_RxK = a_RxK**2 * ff_RxK + p_star_RxK**2 * w_Rx1
    error_RxK += 2 * (a_RxK * p_star_RxK * f_RxK - a_RxK * fp_RxK - p_star_RxK * p_Rx1)
    best_R = error_RxK.argmin(axis=1)
    rows_R = np.arange(len(best_R))
    alpha_R = alpha_K[best_R]
    return np.stack([a_RxK[rows_R, best_R] * scale**alpha_R, alpha_R, p_star_RxK[rows_R, best_R]], axis=1)


def sigmoid_grid_fits(flops_N: np.ndarray, accuracy_N: np.ndarray, start: float, weights_RxN: np.ndarray) -> np.ndarray:
    """Return ceiling, midpoint and exponent of the weighted least-squares fit for each row of weights, float [R, 3].

    Midpoint and exponent are on a grid, and then on a finer one around the best; the ceiling is the exact optimum for them. See
    `power_law_grid_fits`.
    """
    midpoints_M = np.geomspace(*midpoint_bounds(flops_N), _MIDPOINTS)
    exponents_B = np.geomspace(*EXPONENT_BOUNDS, _EXPONENTS)
    # Of the finer grid, relative to the best of the coarse one: up to its neighbors.
    factors_F = np.linspace(-1, 1, _REFINEMENTS)
    midpoint_factors_F = (midpoints_M[1] / midpoints_M[0]) ** factors_F
    exponent_factors_F = (exponents_B[1] / exponents_B[0]) ** factors_F
    fits = []
    for weights_BxN in np.array_split(weights_RxN, -(-len(weights_RxN) // _ROWS_AT_ONCE)):
        coarse_1xK = (np.repeat(midpoints_M, _EXPONENTS)[None], np.tile(exponents_B, _MIDPOINTS)[None])
        best_Bx3 = _best_sigmoids(flops_N, accuracy_N, start, weights_BxN, *coarse_1xK)
        midpoint_BxK = best_Bx3[:, 1:2] * np.repeat(midpoint_factors_F, _REFINEMENTS)
        exponent_BxK = best_Bx3[:, 2:3] * np.tile(exponent_factors_F, _REFINEMENTS)
        fine_BxK = (np.clip(midpoint_BxK, *midpoint_bounds(flops_N)), np.clip(exponent_BxK, *EXPONENT_BOUNDS))
        fits.append(_best_sigmoids(flops_N, accuracy_N, start, weights_BxN, *fine_BxK))
    return np.concatenate(fits)


def _best_sigmoids(
    flops_N: np.ndarray,
    accuracy_N: np.ndarray,
    start: float,
    weights_RxN: np.ndarray,
    midpoint_XxK: np.ndarray,
    exponent_XxK: np.ndarray,
) -> np.ndarray:
    """Return ceiling, midpoint and exponent of the best of K sigmoids for each row of weights, float [R, 3].

    X is R, or 1 if the sigmoids are the same for all rows.
    """
    step_XxKxN = _step(flops_N, midpoint_XxK[..., None], exponent_XxK[..., None])
    gain_N = accuracy_N - start
    # Weighted sums of f^2 and f p, with f the step and p the gain.
    ff_RxK = (step_XxKxN**2 @ weights_RxN[..., None])[..., 0]
    fp_RxK = (step_XxKxN @ (weights_RxN * gain_N)[..., None])[..., 0]
    # The error is quadratic in the gain, so the best gain within its bounds is the free one, clipped.
    gain_RxK = np.clip(fp_RxK / ff_RxK, ACCURACY_BOUNDS[0] - start, ACCURACY_BOUNDS[1] - start)
    best_R = (gain_RxK * (gain_RxK * ff_RxK - 2 * fp_RxK)).argmin(axis=1)
    rows_R = np.arange(len(best_R))
    of_sigmoid_R = rows_R if len(midpoint_XxK) > 1 else np.zeros_like(rows_R)
    return np.stack(
        [start + gain_RxK[rows_R, best_R], midpoint_XxK[of_sigmoid_R, best_R], exponent_XxK[of_sigmoid_R, best_R]],
        axis=1,
    )
