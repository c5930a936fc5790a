"""Averages, comparisons and metrics of several samples, against SciPy, closed forms, enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from rpt_jax.evaluation.statistics import (
    averages,
    compare,
    detectable_difference,
    macro_average,
    majority_correct,
    majority_vote,
    mcnemar_exact,
    micro_average,
    pass_at_k,
    powers_of_two,
)


def test_micro_average_of_answers_is_that_of_a_t_test_or_wilsons():
    values = (np.arange(50) < 20).astype(float)
    interval = scipy.stats.ttest_1samp(values, popmean=0).confidence_interval(0.95)
    np.testing.assert_allclose(micro_average(values), [0.4, interval.low, interval.high])
    for right in (0, 30):
        wilson = scipy.stats.binomtest(right, 30).proportion_ci(method="wilson")
        expected = [right / 30, wilson.low, wilson.high]
        np.testing.assert_allclose(micro_average(np.full(30, right / 30)), expected, atol=1e-4)


def test_macro_average_counts_each_category_the_same():
    values = np.array([1.0, 1, 1, 0, 0, 1])
    average = macro_average(values, ["a", "a", "a", "a", "b", "b"])
    assert average.mean == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert average.low < average.mean < average.high


def test_macro_average_of_two_categories_has_the_interval_of_welchs_test():
    """The mean of two independent means has half the standard error of their difference, and the same degrees of freedom."""
    rng = np.random.default_rng(0)
    a, b = rng.random(12), rng.random(30) ** 2
    average = macro_average(np.concatenate([a, b]), ["a"] * 12 + ["b"] * 30)
    welch = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(average.mean, (a.mean() + b.mean()) / 2)
    np.testing.assert_allclose(average.high - average.low, (welch.high - welch.low) / 2)


@pytest.mark.parametrize(("sizes", "least"), [([40, 60, 200], 0.93), ([200] * 14, 0.93), ([8] * 10, 0.92)])
def test_intervals_of_macro_averages_cover_the_truth_as_often_as_they_say(sizes, least):
    rng = np.random.default_rng(1)
    chances = np.linspace(0.2, 0.9, len(sizes))
    categories = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    trials = 400
    covered = 0
    for _ in range(trials):
        values = np.concatenate([rng.random(size) < chance for size, chance in zip(sizes, chances, strict=True)])
        average = macro_average(values.astype(float), categories)
        covered += average.low <= chances.mean() <= average.high
    assert least <= covered / trials <= 0.98


def test_macro_average_without_any_variance_is_not_certain():
    average = macro_average(np.ones(20), ["a", "b"] * 10)
    wilson = scipy.stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert average.mean == 1.0 and average.low == pytest.approx(wilson.low, abs=1e-4)
    assert macro_average(np.ones(2), ["a", "b"]).low < 0.5


def test_averages_without_categories_have_one_unnamed_category():
    result = averages(np.array([0.0, 1.0]), ["", ""])
    assert result["micro"]["count"] == 2 and list(result["categories"]) == [""]


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 6), (10, 3), (5, 5), (40, 20)])
def test_mcnemars_p_value_is_the_sum_of_both_binomial_tails(only_a, only_b):
    both_right, both_wrong = 7, 4
    a = np.array([1] * both_right + [0] * both_wrong + [1] * only_a + [0] * only_b)
    b = np.array([1] * both_right + [0] * both_wrong + [0] * only_a + [1] * only_b)
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar_exact(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemars_test_needs_answers_that_are_right_or_wrong():
    assert mcnemar_exact(np.array([0.5, 1.0]), np.array([0.0, 1.0])) is None


def test_interval_of_a_difference_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(2)
    a = (rng.random(400) < 0.4).astype(float)
    b = np.where(rng.random(400) < 0.2, 1.0, a)
    comparison = compare(a, b, [""] * 400)
    interval = scipy.stats.ttest_rel(b, a).confidence_interval(0.95)
    np.testing.assert_allclose([comparison.low, comparison.high], interval)
    assert comparison.only_a == 0 and comparison.only_b == int(np.sum(b > a))
    np.testing.assert_allclose(comparison[:3], comparison[3:6])  # One category: macro is micro.
    assert comparison.mcnemar_p == mcnemar_exact(a, b)


def test_interval_of_a_difference_between_clusters_of_a_size_is_that_of_the_t_test_of_their_means():
    rng = np.random.default_rng(4)
    a, b = rng.random((2, 60))
    comparison = compare(a, b, ["x"] * 60, np.repeat(np.arange(12), 5))
    interval = scipy.stats.ttest_1samp((b - a).reshape(12, 5).mean(axis=1), 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([comparison.low, comparison.high], interval)


@pytest.mark.parametrize("clusters", [2, 3, 5, 10, 30])
def test_intervals_of_differences_cover_the_truth_as_often_as_they_say_with_few_clusters(clusters):
    rng = np.random.default_rng(clusters)
    cluster_N = np.repeat(np.arange(clusters), 40)
    trials, truth, covered = 1000, 0.1, 0
    for _ in range(trials):
        gains_N = rng.normal(truth, 0.05, clusters)[cluster_N]
        a, b = rng.uniform(0.0, 0.5, (2, len(cluster_N)))
        comparison = compare(a, b + gains_N, [""] * len(cluster_N), cluster_N)
        covered += comparison.low <= truth <= comparison.high
    assert 0.93 <= covered / trials <= 0.98


def test_one_cluster_or_no_variance_gives_no_interval():
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 2, (2, 50)).astype(float)
    one_document = compare(a, b, [""] * 50, np.zeros(50, int))
    the_same = compare(a, a, [""] * 50)
    for comparison in (one_document, the_same):
        assert comparison.low is comparison.high is comparison.macro_low is comparison.macro_high is None
        assert comparison.detectable is None
    assert one_document.difference == pytest.approx((b - a).mean()) and the_same.difference == 0
    assert one_document.mcnemar_p is None, "positions of a document are not independent"


def test_a_category_of_one_document_says_nothing_about_others():
    values, categories = np.array([1.0, 0, 1, 0, 1, 1]), ["a"] * 4 + ["b"] * 2
    certain = macro_average(values, categories)
    of_documents = macro_average(values, categories, np.array([0, 1, 2, 3, 4, 4]))
    assert of_documents.mean == certain.mean
    assert of_documents.high - of_documents.low > certain.high - certain.low


def test_a_detectable_difference_is_found_by_four_of_five_tests():
    rng = np.random.default_rng(5)
    differences_SxN = rng.normal(size=(2000, 300))
    interval = scipy.stats.ttest_1samp(differences_SxN[0], 0.0).confidence_interval(0.95)
    shifted_SxN = differences_SxN + detectable_difference(interval.low, interval.high)
    found = scipy.stats.ttest_1samp(shifted_SxN, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.06)


def test_comparison_of_clusters_is_wider_than_that_of_independent_questions():
    rng = np.random.default_rng(3)
    cluster_N = np.repeat(np.arange(20), 20)
    a, b = np.zeros(400), (rng.random(20) < 0.5).astype(float)[cluster_N]
    of_clusters = compare(a, b, [""] * 400, cluster_N)
    of_questions = compare(a, b, [""] * 400)
    assert of_clusters.high - of_clusters.low > 3 * (of_questions.high - of_questions.low)


def test_macro_difference_is_that_of_the_macro_averages():
    categories = ["x"] * 6 + ["y"] * 2
    a, b = np.array([1.0, 0, 0, 0, 0, 0, 0, 0]), np.array([1.0, 1, 1, 0, 0, 0, 0, 1])
    comparison = compare(a, b, categories)
    expected = macro_average(b, categories).mean - macro_average(a, categories).mean
    assert comparison.macro_difference == pytest.approx(expected)
    assert comparison.difference == pytest.approx(3 / 8)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(k):
    for right in range(7):
        samples = [1.0] * right + [0.0] * (6 - right)
        choices = list(itertools.combinations(samples, k))
        expected = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(np.array([samples]), k)[0] == pytest.approx(expected)


def test_pass_at_more_than_the_samples_is_refused():
    with pytest.raises(ValueError, match="8"):
        pass_at_k(np.ones((2, 4)), 8)


def test_majority_of_samples():
    assert majority_vote(["A", "B", "A", None, None, None]) == ["A"]
    assert majority_vote([None, None]) == []
    assert majority_correct(["A", "B", "A"], [0, 1, 0]) == 0.0
    assert majority_correct(["A", "B", None], [0, 1, 0]) == 0.5
    assert majority_correct([None], [0]) == 0.0


def test_ks_of_pass_at_k():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]
