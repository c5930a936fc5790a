"""Averages with confidence intervals, comparison of two policies, and metrics of several samples a question.

Intervals are at 95 %. Nothing here needs JAX.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

CONFIDENCE = 0.95
_Z = 1.96  # Half width of a 95 % interval in standard errors of a normal distribution.
# Standard errors between no difference and one that a two-sided test at 5 % finds with a probability of 80 %: 1.96 + 0.84.
_DETECTABLE = 2.8
_RESAMPLES = 9999
_VALUES_AT_ONCE = 10_000_000  # Bounds the memory of the bootstrap.
_LARGEST_VARIANCE = 0.25  # Of values in [0, 1], about.


class Average(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


# --- averages -----------------------------------------------------------------------------------------


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
    mean = float(values_N.mean()) if len(values_N) else 0.0
    if cluster_N is None:
        cluster_N = np.arange(len(values_N))
    _, index_N = np.unique(cluster_N, return_inverse=True)
    residuals_C = np.bincount(index_N, weights=values_N - mean)
    count = len(residuals_C)
    spread = float(np.sqrt(np.sum(residuals_C**2)))
    if count > 1 and spread > 1e-9 * len(values_N):
        center = mean
        standard_error = np.sqrt(count / (count - 1)) * spread / len(values_N)
        half_width = scipy.special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * standard_error
    else:
        center = (count * mean + _Z**2 / 2) / (count + _Z**2)
        half_width = _Z * np.sqrt(count * mean * (1 - mean) + _Z**2 / 4) / (count + _Z**2)
    return Average(mean, max(0.0, float(center - half_width)), min(1.0, float(center + half_width)))


def student_average(values_N: np.ndarray) -> Average:
    """Return the mean of independent values of any range, such as differences, and the interval of Student's t distribution.

    Args:
      values_N: at least two; if they are all the same, the interval has no width, and says nothing.
    """
    count = len(values_N)
    mean = float(values_N.mean())
    standard_error = float(values_N.std(ddof=1)) / np.sqrt(count)
    half_width = float(scipy.special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * standard_error)
    return Average(mean, mean - half_width, mean + half_width)


def welch_difference(values_N: np.ndarray, others_M: np.ndarray) -> Average:
    """Return the difference of the means of two independent samples, and the interval of Welch's t distribution.

    SciPy's `ttest_ind` gives the same, but warns if one sample is constant, as are direct predictions of an untrained policy.

    Args:
      values_N, others_M: at least two each; those of one sample, at least, must differ.
    """
    terms = np.array([sample.var(ddof=1) / len(sample) for sample in (values_N, others_M)])
    sizes = np.array([len(values_N), len(others_M)])
    mean = float(values_N.mean() - others_M.mean())
    degrees = terms.sum() ** 2 / np.sum(terms**2 / (sizes - 1))
    half_width = float(scipy.special.stdtrit(degrees, 0.5 + CONFIDENCE / 2) * np.sqrt(terms.sum()))
    return Average(mean, mean - half_width, mean + half_width)


def macro_average(values_N: np.ndarray, category_N: Sequence[str]) -> Average:
    """Return the unweighted mean of the category means.

    The variance of the result is the sum of those of the category means, over the squared number of categories, and the interval
    is Student's with the degrees of freedom of Welch and Satterthwaite. A category of one value says nothing about its own
    variance, and counts with 1/4. If no category has any variance, the interval is Wilson's over all values.

    Args:
      values_N: in [0, 1].
      category_N: the category of each value.
    """
    groups = [values_N[index] for index in category_indices(category_N).values()]
    if not groups:
        return micro_average(values_N)
    mean = float(np.mean([group.mean() for group in groups]))
    variances = np.array([group.var(ddof=1) if len(group) > 1 else _LARGEST_VARIANCE for group in groups])
    sizes = np.array([len(group) for group in groups])
    terms = variances / sizes / len(groups) ** 2
    if terms.sum() < 1e-15:
        constant = micro_average(np.full(len(values_N), mean))
        return constant._replace(mean=mean)
    degrees = terms.sum() ** 2 / np.sum(terms**2 / np.maximum(sizes - 1, 1))
    half_width = float(scipy.special.stdtrit(degrees, 0.5 + CONFIDENCE / 2) * np.sqrt(terms.sum()))
    return Average(mean, max(0.0, mean - half_width), min(1.0, mean + half_width))


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
        "macro": macro_average(values_N, category_N)._asdict() | {"count": len(categories)},
        "categories": categories,
    }


# --- two policies on the same questions ---------------------------------------------------------------


class Comparison(NamedTuple):
    """The difference of two policies on the same questions, b - a.

    Attributes:
      difference: of their means.
      low, high: 95 % interval of the difference, by the paired bootstrap.
      macro_difference, macro_low, macro_high: the same of their macro averages.
      only_a, only_b: number of questions that only one of them answers, rounded to right or wrong.
      mcnemar_p: two-sided p-value of McNemar's exact test; None if an answer is neither 0 nor 1, as a mean over samples is.
      detectable: the difference that such a comparison finds with a probability of 80 %, see `detectable_difference`.
      count: number of questions.
    """

    difference: float
    low: float
    high: float
    macro_difference: float
    macro_low: float
    macro_high: float
    only_a: int
    only_b: int
    mcnemar_p: float | None
    detectable: float
    count: int


def compare(
    a_N: np.ndarray,
    b_N: np.ndarray,
    category_N: Sequence[str],
    cluster_N: np.ndarray | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare two policies on the same questions.

    Args:
      a_N, b_N: how well each policy answers each question, in [0, 1].
      category_N: the category of each question; for the macro average, each category is resampled by itself.
      cluster_N: integers, the independent unit of each question, such as a document; None if each question is its own.
      seed: of the resampling.
    """
    if cluster_N is None:
        cluster_N = np.arange(len(a_N))
    differences_N = np.asarray(b_N, float) - np.asarray(a_N, float)
    rng = np.random.default_rng(seed)
    groups = list(category_indices(category_N).values())
    macro_resampled = np.mean([_bootstrap_means(differences_N[g], cluster_N[g], rng) for g in groups], axis=0)
    low, high = _percentile_interval(_bootstrap_means(differences_N, cluster_N, rng))
    macro_low, macro_high = _percentile_interval(macro_resampled)
    return Comparison(
        difference=float(differences_N.mean()),
        low=low,
        high=high,
        macro_difference=float(np.mean([differences_N[g].mean() for g in groups])),
        macro_low=macro_low,
        macro_high=macro_high,
        only_a=int((differences_N < 0).sum()),
        only_b=int((differences_N > 0).sum()),
        mcnemar_p=mcnemar_exact(a_N, b_N),
        detectable=detectable_difference(low, high),
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


def _bootstrap_means(values_N: np.ndarray, cluster_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the means of resamples of whole clusters."""
    _, index_N = np.unique(cluster_N, return_inverse=True)
    sums_C = np.bincount(index_N, weights=values_N)
    sizes_C = np.bincount(index_N).astype(float)
    if len(sums_C) < 2:
        return np.full(_RESAMPLES, values_N.mean())
    result = scipy.stats.bootstrap(
        (sums_C, sizes_C),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _VALUES_AT_ONCE // len(sums_C)),
        method="percentile",
        rng=rng,
    )
    return result.bootstrap_distribution


def _percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


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
