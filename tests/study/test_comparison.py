"""Means, spreads and differences of arms, against SciPy, the standard library and simulation."""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

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
@hypothesis.given(ntp=BY_SEED, rpt=BY_SEED)
def test_differences_at_a_budget_are_paired_by_the_seeds_that_both_arms_have(
    ntp: dict[int, float], rpt: dict[int, float]
) -> None:
    outcomes = [outcome("ntp", seed, 1e12, value) for seed, value in ntp.items()]
    outcomes += [outcome("rpt", seed, 1e12, value) for seed, value in rpt.items()]
    found = row(study(outcomes, ("ntp", "rpt")), "rpt", 1e12).differences["reasoning/hard"].get("ntp")
    pairs = [(rpt[seed], ntp[seed]) for seed in ntp.keys() & rpt.keys()]
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


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(base=BY_SEED, rpt=BY_SEED, order=st.randoms())
def test_differences_to_an_arm_without_a_budget_are_welchs(
    base: dict[int, float], rpt: dict[int, float], order: random.Random
) -> None:
    """Such runs have no seed in common, so it does not matter which of them has which number."""
    shuffled = order.sample(list(base.values()), len(base))
    outcomes = [outcome("base", seed, None, value) for seed, value in enumerate(shuffled)]
    outcomes += [outcome("rpt", seed, 1e12, value) for seed, value in rpt.items()]
    found = row(study(outcomes), "rpt", 1e12).differences["reasoning/hard"]["base"]
    values, others = list(rpt.values()), list(base.values())
    assert found.pairs is None
    assert found.mean == pytest.approx(statistics.fmean(values) - statistics.fmean(others), abs=1e-12)
    if min(len(values), len(others)) < 2 or max(len(set(values)), len(set(others))) < 2:
        assert found.low is None and found.high is None and found.direction is None and found.no_interval
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy doubts the variance of equal values.
        expected = scipy.stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, atol=1e-9)


@pytest.mark.parametrize(("differences", "smallest"), [((0.1, 0.2, 0.3), 0.25), ((0.5, 0.1), 0.5), ((0.3,), 1.0)])
def test_no_permutation_of_paired_seeds_has_a_smaller_p_value(differences: tuple[float, ...], smallest: float) -> None:
    """These differences have the same sign, so that only two of the permutations are as far from 0."""
    difference = Difference.paired(Spread(dict(enumerate(differences))), Spread(dict.fromkeys(range(9), 0.0)))
    assert difference is not None and difference.smallest_p == smallest
    if len(differences) > 1:
        found = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples")
        assert found.pvalue == smallest


@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 5)])
def test_no_permutation_of_independent_seeds_has_a_smaller_p_value(first: int, second: int) -> None:
    values, others = (
        Spread({seed: 0.9 + seed / 100 for seed in range(first)}),
        Spread(dict.fromkeys(range(second), 0.1)),
    )
    samples = [list(side.by_seed.values()) for side in (values, others)]
    found = scipy.stats.permutation_test(samples, lambda a, b: np.mean(a) - np.mean(b), vectorized=False)
    assert Difference.independent(values, others).smallest_p == pytest.approx(found.pvalue)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("compare", "common", "most"), [(Difference.paired, 0.02, 0.97), (Difference.independent, 0.0, 0.98)]
)
def test_intervals_cover_the_true_difference_as_often_as_they_say(
    compare: Callable[[Spread, Spread], Difference], common: float, most: float, seeds: int
) -> None:
    """Accuracies are shares of 400 questions. What runs with the same seed have in common has the deviation `common`."""
    rng = np.random.default_rng(0)
    trials = 2000
    chance_TxSx2 = 0.5 + common * rng.normal(size=(trials, seeds, 1)) + 0.02 * rng.normal(size=(trials, seeds, 2))
    share_TxSx2 = rng.binomial(400, chance_TxSx2 + [0.03, 0]) / 400
    found = [compare(*(Spread(dict(enumerate(side_S))) for side_S in share_Sx2.T)) for share_Sx2 in share_TxSx2]
    covered = [each.low <= 0.03 <= each.high for each in found if each.low is not None and each.high is not None]
    assert len(covered) > 0.95 * trials
    assert 0.93 <= np.mean(covered) <= most


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
    assert rpt.differences["reasoning/hard"]["base"].pairs is None
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
