"""Means, spreads and paired differences of arms, against SciPy, the standard library and simulation."""

from __future__ import annotations

import itertools
import statistics

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from rpt_jax.evaluation.statistics import student_average
from rpt_jax.study.comparison import Difference, Row, Spread, compare_arms
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, GAIN, Failure, StudyOutcomes, Unit
from tests.helpers.study import outcome, study

SHARES = st.floats(0, 1).map(lambda value: round(value, 3))
BY_SEED = st.dictionaries(st.integers(0, 9), SHARES, min_size=1, max_size=8)


def row(of: StudyOutcomes, arm: str, budget: float | None) -> Row:
    (found,) = [each for each in compare_arms(of) if (each.arm, each.budget) == (arm, budget)]
    return found


@hypothesis.given(by_seed=BY_SEED)
def test_a_spread_has_the_values_of_the_standard_library(by_seed: dict[int, float]) -> None:
    spread = Spread(by_seed)
    values = list(by_seed.values())
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert (spread.low, spread.high, spread.seeds) == (min(values), max(values), len(values))
    if len(values) > 1:
        assert spread.deviation == pytest.approx(statistics.stdev(values), abs=1e-12)
    else:
        assert spread.deviation is None


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(base=BY_SEED, rpt=BY_SEED)
def test_differences_are_paired_by_the_seeds_that_both_arms_have(base: dict[int, float], rpt: dict[int, float]) -> None:
    outcomes = [outcome("base", seed, None, value) for seed, value in base.items()]
    outcomes += [outcome("rpt", seed, 1e12, value) for seed, value in rpt.items()]
    found = row(study(outcomes), "rpt", 1e12).differences["reasoning/hard"].get("base")
    pairs = [(rpt[seed], base[seed]) for seed in base.keys() & rpt.keys()]
    if not pairs:
        assert found is None
        return
    assert found is not None
    assert found.pairs == len(pairs)
    assert found.mean == pytest.approx(statistics.fmean(a - b for a, b in pairs), abs=1e-12)
    if len({round(a - b, 6) for a, b in pairs}) < 2:
        assert found.low is None and found.high is None and found.direction is None and found.no_interval
        return
    expected = scipy.stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, atol=1e-9)
    assert found.direction == (1 if expected.low > 0 else -1 if expected.high < 0 else 0)


@pytest.mark.parametrize("differences", [(0.1, 0.2, 0.3), (0.5, -0.1), (0.03, 0.05, -0.02, 0.01, 0.06), (-0.1,) * 4])
def test_the_p_value_is_the_share_of_signs_with_a_mean_as_far_from_0(differences: tuple[float, ...]) -> None:
    means = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=len(differences))]
    share = np.mean(np.abs(means) >= abs(sum(differences)) - 1e-12)
    assert Difference.of(differences).p == pytest.approx(share)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_true_difference_as_often_as_they_say(seeds: int) -> None:
    """Accuracies are shares of 400 questions, and runs with the same seed are correlated."""
    rng = np.random.default_rng(0)
    trials = 2000
    chance_TxSx2 = 0.5 + 0.02 * rng.normal(size=(trials, seeds, 1)) + 0.02 * rng.normal(size=(trials, seeds, 2))
    share_TxSx2 = rng.binomial(400, chance_TxSx2 + [0.03, 0]) / 400
    averages = [student_average(values_S) for values_S in share_TxSx2[..., 0] - share_TxSx2[..., 1]]
    covered = np.mean([average.low <= 0.03 <= average.high for average in averages])
    assert 0.93 <= covered <= 0.97


def test_a_reference_is_taken_at_the_same_budget_or_without_one() -> None:
    values = {("base", None): 0.1, ("ntp", 1e12): 0.2, ("ntp", 2e12): 0.3, ("rpt", 1e12): 0.5, ("rpt", 2e12): 0.9}
    outcomes = [outcome(arm, seed, budget, value) for (arm, budget), value in values.items() for seed in range(2)]
    of = study(outcomes, ("base", "ntp", "rpt"), references=("base", "ntp"))
    for budget, base, ntp in ((1e12, 0.4, 0.3), (2e12, 0.8, 0.6)):
        differences = row(of, "rpt", budget).differences["reasoning/hard"]
        assert differences["base"].mean == pytest.approx(base)
        assert differences["ntp"].mean == pytest.approx(ntp)
    assert list(row(of, "ntp", 1e12).differences["reasoning/hard"]) == ["base"]
    assert row(of, "base", None).differences["reasoning/hard"] == {}, "ntp has no outcome without a budget"


def test_units_that_failed_or_are_missing_are_counted_and_not_averaged() -> None:
    outcomes = [outcome("base", 0, None, 0.1), outcome("rpt", 0, 1e12, 0.5), outcome("rpt", 3, 1e12, 0.7)]
    failures = (Failure("rpt", 1, 1e12, "training", "no memory", "log"), Failure("ntp", 0, 1e12, "training", "", ""))
    of = study(outcomes, ("base", "rpt", "ntp"), failures=failures, missing=(Unit("rpt", 2, 1e12),))
    rows = compare_arms(of)
    assert [(each.arm, each.budget) for each in rows] == [("base", None), ("rpt", 1e12), ("ntp", 1e12)]
    rpt, ntp = rows[1:]
    assert (rpt.planned, rpt.failed, rpt.missing, rpt.finished) == (4, 1, 1, 2)
    assert rpt.scores["reasoning/hard"].by_seed == {0: 0.5, 3: 0.7}
    assert rpt.differences["reasoning/hard"]["base"].pairs == 1
    assert (ntp.finished, ntp.flops, ntp.scores, ntp.contrasts) == (0, None, {}, {})


def test_a_contrast_is_paired_within_runs() -> None:
    before = {0: 0.2, 1: 0.3, 2: 0.4}
    after = {0: 0.3, 1: 0.35, 2: 0.6}
    outcomes = [
        outcome("rpt", seed, 1e12, 0.5, **{BEFORE_TUNING: before[seed], AFTER_TUNING: after[seed]}) for seed in before
    ]
    gain = row(study(outcomes), "rpt", 1e12).contrasts[GAIN]
    expected = scipy.stats.ttest_rel(list(after.values()), list(before.values())).confidence_interval(0.95)
    np.testing.assert_allclose((gain.low, gain.high), expected)
    assert row(study([outcome("rpt", 0, 1e12, 0.5)]), "rpt", 1e12).contrasts == {}
