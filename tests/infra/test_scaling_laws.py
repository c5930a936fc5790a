"""Power law and sigmoid: the fit is the least-squares optimum, and what the points do not determine has a reason."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from rpt_jax.infra.scaling_laws import (
    NotDetermined,
    PowerLaw,
    Sigmoid,
    fit_power_law,
    fit_sigmoid,
    power_law_grid_fits,
    sigmoid_grid_fits,
)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    start=st.floats(1e6, 1e24),
    span=st.floats(5, 100),
    alpha=st.floats(0.1, 2.0),
    p_star=st.floats(0.1, 0.99),
    drop=st.floats(0.05, 0.9),
    count=st.integers(4, 12),
)
def test_known_parameters_are_recovered(
    start: float, span: float, alpha: float, p_star: float, drop: float, count: int
) -> None:
    flops_N = np.geomspace(start, start * span, count)
    true = PowerLaw(-drop * p_star * start**alpha, alpha, p_star, 1.0)
    law = fit_power_law(flops_N, true(flops_N))
    assert isinstance(law, PowerLaw)
    np.testing.assert_allclose([law.alpha, law.p_star], [alpha, p_star], rtol=1e-3)
    np.testing.assert_allclose(law.A, true.A, rtol=1e-2 * np.log(start))  # A has the error of alpha times log C.
    np.testing.assert_allclose(law(flops_N), true(flops_N), atol=1e-6)
    assert law.r_squared > 1 - 1e-8


def test_a_noisy_fit_is_the_least_squares_optimum() -> None:
    flops_N = np.geomspace(1e20, 1e21, 9)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        accuracy_N = 0.45 - 0.3 * (flops_N / 1e20) ** -0.9 + 0.01 * rng.normal(size=9)
        law = fit_power_law(flops_N, accuracy_N)

        def curve(c: np.ndarray, a: float, alpha: float, p_star: float) -> np.ndarray:
            return a * (c / 1e20) ** -alpha + p_star

        best = min(
            np.sum((curve(flops_N, *parameters) - accuracy_N) ** 2)
            for alpha in (0.1, 0.5, 1.0, 2.0)
            for parameters, _ in [
                scipy.optimize.curve_fit(
                    curve, flops_N, accuracy_N, (-0.3, alpha, 0.5), bounds=([-99, 0.01, 0], [99, 5, 1]), max_nfev=10_000
                )
            ]
        )
        assert np.sum((law(flops_N) - accuracy_N) ** 2) <= best * (1 + 1e-6)
        assert law == fit_power_law(flops_N, accuracy_N)


def test_r_squared_is_one_minus_residual_over_total() -> None:
    flops_N = 2.0 ** np.arange(7) * 1e15
    accuracy_N = np.array([0.10, 0.22, 0.255, 0.31, 0.31, 0.345, 0.335])
    law = fit_power_law(flops_N, accuracy_N)
    residual = sum((p - (law.A / c**law.alpha + law.p_star)) ** 2 for c, p in zip(flops_N, accuracy_N, strict=True))
    total = sum((p - 1.875 / 7) ** 2 for p in accuracy_N)
    assert law.r_squared == pytest.approx(1 - residual / total, abs=1e-9)
    assert 0.9 < law.r_squared < 0.999


SEVERAL = np.geomspace(1e18, 1e21, 8)
NOISE = np.random.default_rng(0).normal(size=8)


@pytest.mark.parametrize(
    ("accuracy", "word"),
    [
        pytest.param(0.3 + 0.02 * NOISE, "bound", id="noise"),
        pytest.param(0.3 + 0.03 * np.log10(SEVERAL / 1e18), "bound", id="a straight line has no ceiling"),
        pytest.param(0.05 * np.arange(1, 9) ** 1.3, "bound", id="an acceleration has no ceiling either"),
        pytest.param(0.4 - 0.01 * np.arange(8) ** 1.8, "bound", id="nor a fall that accelerates a floor"),
        pytest.param(np.full(8, 0.3), "same", id="constant"),
    ],
)
def test_points_that_do_not_determine_the_curve_have_no_fit(accuracy: np.ndarray, word: str) -> None:
    law = fit_power_law(SEVERAL, accuracy)
    assert isinstance(law, NotDetermined)
    assert word in law.reason


def test_points_that_do_not_determine_the_curve_are_described_by_the_closest_one() -> None:
    accuracy = 0.3 + 0.03 * np.log10(SEVERAL / 1e18)
    law = fit_power_law(SEVERAL, accuracy)
    assert isinstance(law, NotDetermined) and law.closest
    np.testing.assert_allclose(law.closest(SEVERAL), accuracy, atol=0.002)
    residuals = law.closest(SEVERAL) - accuracy
    np.testing.assert_allclose(law.closest.r_squared, 1 - (residuals @ residuals) / (np.var(accuracy) * len(accuracy)))


def test_little_noise_leaves_the_curve_determined() -> None:
    law = fit_power_law(SEVERAL, 0.5 - 0.3 * (SEVERAL / 1e18) ** -0.5 + 0.01 * NOISE)
    assert isinstance(law, PowerLaw)
    assert abs(law.p_star - 0.5) < 0.05


def test_step_zero_is_left_out_and_too_few_points_have_no_fit() -> None:
    flops = [0.0, 1e20, 2e20, 4e20, 8e20]
    accuracy = [0.9, 0.1, 0.2, 0.25, 0.27]
    assert isinstance(fit_power_law(flops, accuracy), PowerLaw)
    assert fit_power_law(flops, accuracy) == fit_power_law(flops[1:], accuracy[1:])
    assert isinstance(fit_power_law(flops[:4], accuracy[:4]), NotDetermined)
    assert isinstance(fit_power_law([1e20, 1e20, 2e20, 4e20], [0.1, 0.2, 0.3, 0.4]), NotDetermined)
    assert isinstance(fit_power_law([], []), NotDetermined)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    start=st.floats(0.0, 0.5),
    gain=st.floats(0.1, 0.45),
    middle=st.floats(0.2, 0.8),
    exponent=st.floats(0.5, 4.0),
    smallest=st.floats(1e6, 1e22),
    count=st.integers(6, 12),
)
def test_the_parameters_of_a_sigmoid_are_recovered(
    start: float, gain: float, middle: float, exponent: float, smallest: float, count: int
) -> None:
    flops_N = np.geomspace(smallest, 100 * smallest, count)
    true = Sigmoid(start, start + gain, smallest * 100**middle, exponent, 1.0)
    law = fit_sigmoid(flops_N, true(flops_N), start)
    assert isinstance(law, Sigmoid)
    np.testing.assert_allclose(
        [law.ceiling, law.midpoint, law.exponent], [true.ceiling, true.midpoint, true.exponent], rtol=1e-3
    )
    assert law.r_squared > 1 - 1e-8


def test_a_noisy_sigmoid_is_the_least_squares_optimum() -> None:
    flops_N = np.geomspace(1e12, 1e14, 15)

    def curve(c: np.ndarray, ceiling: float, log_midpoint: float, exponent: float) -> np.ndarray:
        return 0.1 + (ceiling - 0.1) / (1 + (np.exp(log_midpoint) / c) ** exponent)

    for seed in range(5):
        accuracy_N = curve(flops_N, 0.6, np.log(1e13), 1.2) + 0.01 * np.random.default_rng(seed).normal(size=15)
        law = fit_sigmoid(flops_N, accuracy_N, 0.1)
        assert isinstance(law, Sigmoid)
        best, _ = scipy.optimize.curve_fit(curve, flops_N, accuracy_N, (0.5, np.log(1e13), 1.0))
        error = np.sum((curve(flops_N, *best) - accuracy_N) ** 2)
        assert np.sum((law(flops_N) - accuracy_N) ** 2) <= error * (1 + 1e-6)
        total = np.sum((accuracy_N - np.mean(accuracy_N)) ** 2)
        assert law.r_squared == pytest.approx(1 - error / total, abs=1e-6)


@pytest.mark.parametrize("accuracy", [0.3 + 0.02 * NOISE, 0.3 + 0.03 * np.log10(SEVERAL / 1e18), np.full(8, 0.3)])
def test_points_that_do_not_determine_a_sigmoid_have_no_fit(accuracy: np.ndarray) -> None:
    assert isinstance(fit_sigmoid(SEVERAL, accuracy, 0.1), NotDetermined)


@pytest.mark.parametrize("seed", range(5))
def test_grid_fits_are_near_the_exact_ones_for_each_row_of_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flops_N = np.geomspace(1e15, 1e17, 12)
    accuracy_N = 0.6 - 0.4 * (flops_N / 1e15) ** -0.6 + 0.02 * rng.normal(size=12)
    weights_RxN = rng.integers(0, 3, (3, 12)) + np.eye(3, 12) + 0.1

    def power_law(parameters: np.ndarray) -> np.ndarray:
        a, log_alpha, p_star = parameters
        return a * (flops_N / 1e16) ** -np.exp(log_alpha) + p_star

    def sigmoid(parameters: np.ndarray) -> np.ndarray:
        ceiling, log_midpoint, log_exponent = parameters
        return Sigmoid(0.1, ceiling, np.exp(log_midpoint), np.exp(log_exponent), 0.0)(flops_N)

    def excess(curve: Callable, found: np.ndarray, bounds: np.ndarray, weights_N: np.ndarray) -> float:
        """Return how far the curve is from that of the exact fit, at most."""
        best = scipy.optimize.least_squares(
            lambda parameters: np.sqrt(weights_N) * (curve(parameters) - accuracy_N),
            np.clip(found, *bounds),
            bounds=bounds,
        )
        return np.abs(curve(best.x) - curve(found)).max()

    alpha_bounds = np.array([(-np.inf, np.log(0.01), 0), (np.inf, np.log(5), 1)])
    for weights_N, (a, alpha, p_star) in zip(
        weights_RxN, power_law_grid_fits(flops_N, accuracy_N, weights_RxN), strict=True
    ):
        found = np.array((a / 1e16**alpha, np.log(alpha), p_star))
        assert excess(power_law, found, alpha_bounds, weights_N) < 0.001
    sigmoid_bounds = np.array([(0, np.log(1e14), np.log(0.2)), (1, np.log(1e18), np.log(10))])
    for weights_N, (ceiling, midpoint, exponent) in zip(
        weights_RxN, sigmoid_grid_fits(flops_N, accuracy_N, 0.1, weights_RxN), strict=True
    ):
        found = np.array((ceiling, np.log(midpoint), np.log(exponent)))
        assert excess(sigmoid, found, sigmoid_bounds, weights_N) < 0.003
