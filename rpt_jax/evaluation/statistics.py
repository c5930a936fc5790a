"""Averages with confidence intervals, comparison of two policies, and metrics of several samples a question.

Intervals are at 95 %. Nothing here needs JAX.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

CONFIDENCE = 0.95
_Z = 1.96  # Half width of a 95 % interval in standard errors of a normal distribution.
# Standard errors between no difference and one that a two-sided test at 5 % finds with a probability of 80 %: 1.96 + 0.84.
_DETECTABLE = 2.8
# About the largest variances of values in [0, 1], and of differences of two.
_LARGEST_VARIANCE = 0.25
_LARGEST_VARIANCE_OF_DIFFERENCES = 1.0


class Average(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


# --- averages -----------------------------------------------------------------------------------------


class _Estimate(NamedTuple):
    """A mean, the variance of that mean, and the degrees of freedom of the variance."""

    mean: float
    variance: float
    degrees: float

    def interval(self) -> tuple[float, float]:
        """Return the interval of Student's t distribution."""
        half_width = scipy.special.stdtrit(self.degrees, 0.5 + CONFIDENCE / 2) * np.sqrt(self.variance)
        return float(self.mean - half_width), float(self.mean + half_width)


def _mean_of_clusters(values_N: np.ndarray, cluster_N: np.ndarray) -> _Estimate:
    """Return the mean of values with the cluster-robust variance, and a degree of freedom less than there are clusters.

    If all clusters have the same mean, or there is only one, the variance is 0 and says nothing about others.
    """
    mean = float(values_N.mean())
    _, index_N = np.unique(cluster_N, return_inverse=True)
    residuals_C = np.bincount(index_N, weights=values_N - mean)
    count = len(residuals_C)
    spread = float(np.sum(residuals_C**2))
    if count < 2 or spread <= (1e-9 * len(values_N)) ** 2:
        return _Estimate(mean, 0.0, count - 1)
    return _Estimate(mean, count / (count - 1) * spread / len(values_N) ** 2, count - 1)


def _mean_of_categories(
    values_N: np.ndarray, category_N: Sequence[str], cluster_N: np.ndarray, largest_variance: float
) -> _Estimate:
    """Return the unweighted mean of the category means, with the degrees of freedom of Welch and Satterthwaite.

    A category of one cluster says nothing about its own variance, and counts with the largest. No cluster may have values of
    several categories.
    """
    estimates = [
        _mean_of_clusters(values_N[index], cluster_N[index]) for index in category_indices(category_N).values()
    ]
    estimates = [each if each.degrees else _Estimate(each.mean, largest_variance, 1) for each in estimates]
    total = _independent(float(np.mean([each.mean for each in estimates])), estimates)
    return total._replace(variance=total.variance / len(estimates) ** 2)


def _independent(mean: float, parts: Sequence[_Estimate]) -> _Estimate:
    """Return an estimate with the variance of the sum of independent ones, and the degrees of Welch and Satterthwaite."""
    variance = sum(part.variance for part in parts)
    if not variance:
        return _Estimate(mean, 0.0, 0)
    return _Estimate(mean, variance, variance**2 / sum(part.variance**2 / part.degrees for part in parts))


def micro_average(values_N: np.ndarray, cluster_N: np.ndarray | None = None) -> Average:
    """Return the mean of all values, with clusters as the independent units.

    Values of one cluster, such as the positions of a document, are correlated, so an interval that treats them as independent
    would be too narrow. This is the interval of Student's t distribution with the cluster-robust variance, and a degree of
    freedom less than there are clusters. If all clusters have the same mean, or there is only one, that variance is 0 and says
    nothing about others: the interval is then Wilson's, with one observation a cluster. Without any value it is [0, 1].

    Args:
      values_N: in [0, 1].
      cluster_N: integers, the cluster of each value; None if each value is its own.
    """
    if not len(values_N):
        return Average(0.0, 0.0, 1.0)
    cluster_N = _clusters(values_N, cluster_N)
    return _in_unit_interval(_mean_of_clusters(values_N, cluster_N), len(np.unique(cluster_N)))


def _clusters(values_N: np.ndarray, cluster_N: np.ndarray | None) -> np.ndarray:
    """Return the cluster of each value; each its own if there are no clusters."""
    return np.arange(len(values_N)) if cluster_N is None else cluster_N


def _in_unit_interval(estimate: _Estimate, clusters: int) -> Average:
    """Return an average of values in [0, 1]. Without a variance, its interval is Wilson's, with one observation a cluster."""
    mean = estimate.mean
    if estimate.variance:
        low, high = estimate.interval()
    else:
        center = (clusters * mean + _Z**2 / 2) / (clusters + _Z**2)
        half_width = _Z * math.sqrt(clusters * mean * (1 - mean) + _Z**2 / 4) / (clusters + _Z**2)
        low, high = center - half_width, center + half_width
    return Average(mean, max(0.0, low), min(1.0, high))


def student_average(values_N: np.ndarray) -> Average:
    """Return the mean of independent values of any range, such as differences, and the interval of Student's t distribution.

    Args:
      values_N: at least two; if they are all the same, the interval has no width, and says nothing.
    """
    estimate = _mean_of_clusters(values_N, _clusters(values_N, None))
    return Average(estimate.mean, *estimate.interval())


def welch_difference(values_N: np.ndarray, others_M: np.ndarray) -> Average:
    """Return the difference of the means of two independent samples, and the interval of Welch's t distribution.

    SciPy's `ttest_ind` gives the same, but warns if one sample is constant, as are direct predictions of an untrained policy.

    Args:
      values_N, others_M: at least two each; those of one sample, at least, must differ.
    """
    first, second = (_mean_of_clusters(sample, _clusters(sample, None)) for sample in (values_N, others_M))
    difference = _independent(first.mean - second.mean, [first, second])
    return Average(difference.mean, *difference.interval())


def macro_average(values_N: np.ndarray, category_N: Sequence[str], cluster_N: np.ndarray | None = None) -> Average:
    """Return the unweighted mean of the category means.

    Its variance is the sum of those of the category means, which are as in `micro_average`, over the squared number of
    categories, and the interval is Student's with the degrees of freedom of Welch and Satterthwaite. A category of one cluster
    counts with the largest variance, 1/4. If no category has any variance, the interval is Wilson's over all clusters.

    Args:
      values_N: in [0, 1].
      category_N: the category of each value; the values of a cluster have the same.
      cluster_N: see `micro_average`.
    """
    if not len(values_N):
        return micro_average(values_N)
    cluster_N = _clusters(values_N, cluster_N)
    estimate = _mean_of_categories(values_N, category_N, cluster_N, _LARGEST_VARIANCE)
    return _in_unit_interval(estimate, len(np.unique(cluster_N)))


def category_indices(category_N: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the indices of the values of each category, in alphabetical order of the categories."""
    indices: dict[str, list[int]] = collections.defaultdict(list)
    for index, category in enumerate(category_N):
        indices[category].append(index)
    return {category: np.array(indices[category]) for category in sorted(indices)}


def averages(values_N: np.ndarray, category_N: Sequence[str], cluster_N: np.ndarray | None = None) -> dict[str, Any]:
    """Return the micro and the macro average and the average of each category, as values for a JSON file.

    Args:
      values_N: in [0, 1].
      category_N: the category of each value; "" for none.
      cluster_N: see `micro_average`.

    Returns: "micro", "macro" and "categories", by name; each average has "mean", "low", "high" and "count".
    """
    categories = {}
    for category, index in category_indices(category_N).items():
        average = micro_average(values_N[index], None if cluster_N is None else cluster_N[index])
        categories[category] = average._asdict() | {"count": len(index)}
    return {
        "micro": micro_average(values_N, cluster_N)._asdict() | {"count": len(values_N)},
        "macro": macro_average(values_N, category_N, cluster_N)._asdict() | {"count": len(categories)},
        "categories": categories,
    }


# --- two policies on the same questions ---------------------------------------------------------------


class Comparison(NamedTuple):
    """The difference of two policies on the same questions, b - a.

    Attributes:
      difference: of their means.
      low, high: 95 % interval of the paired difference, with the cluster-robust variance; None if there is only one cluster, or
        the same difference everywhere, which says nothing about others.
      macro_difference, macro_low, macro_high: the same of their macro averages.
      only_a, only_b: number of questions that only one of them answers, rounded to right or wrong.
      mcnemar_p: two-sided p-value of McNemar's exact test; None if an answer is neither 0 nor 1, as a mean over samples is, or if
        a cluster has several questions, which are not independent.
      detectable: the difference that such a comparison finds with a probability of 80 %, see `detectable_difference`; None
        without an interval.
      count: number of questions.
    """

    difference: float
    low: float | None
    high: float | None
    macro_difference: float
    macro_low: float | None
    macro_high: float | None
    only_a: int
    only_b: int
    mcnemar_p: float | None
    detectable: float | None
    count: int


def compare(
    a_N: np.ndarray, b_N: np.ndarray, category_N: Sequence[str], cluster_N: np.ndarray | None = None
) -> Comparison:
    """Compare two policies on the same questions.

    Args:
      a_N, b_N: how well each policy answers each question, in [0, 1].
      category_N: the category of each question, for the macro average; the questions of a cluster have the same.
      cluster_N: integers, the independent unit of each question, such as a document; None if each question is its own.
    """
    differences_N = np.asarray(b_N, float) - np.asarray(a_N, float)
    cluster_N = _clusters(differences_N, cluster_N)
    micro = _mean_of_clusters(differences_N, cluster_N)
    macro = _mean_of_categories(differences_N, category_N, cluster_N, _LARGEST_VARIANCE_OF_DIFFERENCES)
    low, high = micro.interval() if micro.variance else (None, None)
    macro_low, macro_high = macro.interval() if micro.variance and macro.variance else (None, None)
    are_independent = len(np.unique(cluster_N)) == len(differences_N)
    return Comparison(
        difference=micro.mean,
        low=low,
        high=high,
        macro_difference=macro.mean,
        macro_low=macro_low,
        macro_high=macro_high,
        only_a=int((differences_N < 0).sum()),
        only_b=int((differences_N > 0).sum()),
        mcnemar_p=mcnemar_exact(a_N, b_N) if are_independent else None,
        detectable=None if low is None or high is None else detectable_difference(low, high),
        count=len(differences_N),
    )


def detectable_difference(low: float, high: float) -> float:
    """Return the true difference that a two-sided test at 5 % finds with a probability of 80 %.

    It shrinks with the square root of the number of questions.

    Args:
      low, high: 95 % interval of the difference that was measured.
    """
    return _DETECTABLE * (high - low) / (2 * _Z)


def mcnemar_exact(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Return the two-sided p-value of McNemar's exact test, or None if a value is neither 0 nor 1.

    Under the null hypothesis, each question that only one policy answers is equally likely to be either's.
    """
    if not np.isin([a_N, b_N], (0, 1)).all():
        return None
    only_a = int(np.sum((a_N == 1) & (b_N == 0)))
    only_b = int(np.sum((a_N == 0) & (b_N == 1)))
    if only_a + only_b == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


# --- several samples a question -----------------------------------------------------------------------


def pass_at_k(correct_NxG: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that at least one of k samples is correct, float [N].

    It is the unbiased estimate from G samples: the share of all choices of k of them that contain a correct one (Chen et al.,
    arXiv 2107.03374, Equation 1).

    Args:
      correct_NxG: whether each sample is correct, 0 or 1.
      k: at most G.

    Raises: ValueError, if there are fewer than k samples.
    """
    samples = correct_NxG.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs {k} samples, but there are {samples}")
    return scipy.stats.hypergeom.sf(0, samples, correct_NxG.sum(axis=1).astype(int), k)


def majority_vote(answers: Sequence[Hashable | None]) -> list[Hashable]:
    """Return the most frequent answers; several if they are tied, and none if no answer could be read.

    Args:
      answers: of each sample; None for one that could not be read, which does not vote.
    """
    votes = collections.Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return [answer for answer, count in votes.items() if count == most]


def majority_correct(answers: Sequence[Hashable | None], correct: Sequence[float]) -> float:
    """Return the probability that the majority vote is correct, if a tie is broken at random.

    Args:
      answers: of each sample; None for one that could not be read.
      correct: whether each of them is correct, 0 or 1; equal answers are equally correct.
    """
    winners = majority_vote(answers)
    is_correct = dict(zip(answers, correct, strict=True))
    return float(np.mean([is_correct[winner] for winner in winners])) if winners else 0.0


def powers_of_two(samples: int) -> list[int]:
    """Return 1, 2, 4, … up to the number of samples, which is included: the k for which pass@k is reported."""
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return ks if ks[-1] == samples else [*ks, samples]
