"""How often bootstrap intervals of the fits over several budgets cover the true parameters, in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.infra.scaling_laws import PowerLaw, Sigmoid
from rpt_jax.study.scaling import Points, fit_points

pytestmark = pytest.mark.slow
TRIALS = 200
POWER_LAW = PowerLaw(A=-0.4 * 1e12**0.6, alpha=0.6, p_star=0.6, r_squared=1.0)
SIGMOID = Sigmoid(start=0.1, ceiling=0.6, midpoint=3e12, exponent=1.5, r_squared=1.0)


@pytest.mark.parametrize(("budgets", "seeds"), [(4, 3), (4, 5), (6, 3)])
@pytest.mark.parametrize("law", [POWER_LAW, SIGMOID], ids=["power law", "sigmoid"])
def test_bootstrap_intervals_cover_the_true_parameters(
    law: PowerLaw | Sigmoid, budgets: int, seeds: int, capsys: pytest.CaptureFixture
) -> None:
    """Runs scatter by 1 point. Fits that are refused count as neither, so most must be accepted."""
    rng = np.random.default_rng(0)
    flops_N = np.repeat(1e12 * 2.0 ** np.arange(budgets), seeds)
    start = None if isinstance(law, PowerLaw) else law.start
    names = ("alpha", "p_star") if isinstance(law, PowerLaw) else ("ceiling", "midpoint", "exponent")
    covered = []
    for _ in range(TRIALS):
        accuracy_N = law(flops_N) + 0.01 * rng.normal(size=len(flops_N))
        fit = fit_points(Points(flops_N, accuracy_N, flops_N, start), resamples=300)[0 if start is None else 1]
        if fit.intervals:
            covered.append([fit.intervals[name][0] <= getattr(law, name) <= fit.intervals[name][1] for name in names])
    share = np.mean(covered, axis=0)
    with capsys.disabled():
        print(f"\n{type(law).__name__}, {budgets} budgets, {seeds} seeds: {len(covered)} accepted, covered {share}")
    assert len(covered) > 0.6 * TRIALS
    assert share.min() > 0.85
