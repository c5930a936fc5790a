"""The arms of a study side by side: means over seeds, their spread, and differences to the reference arms."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np

from rpt_jax.evaluation.statistics import student_average, welch_difference
from rpt_jax.study.outcome import Contrast, Outcome, StudyOutcomes

_NO_WIDTH = 1e-12


@dataclasses.dataclass(frozen=True)
class Spread:
    """A quantity over seeds.

    Attributes:
      by_seed: its value by seed; at least one.
    """

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.by_seed.values())

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.by_seed.values())

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds (with n - 1); None if there is only one."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.by_seed) > 1 else None

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len(self.by_seed)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference between two sides.

    Attributes:
      mean: of the differences, or the difference of the means if the sides are independent.
      low, high: 95 % interval; None if there is none, for which `no_interval` says why.
      pairs: number of seeds that both sides have; None if the sides are independent.
      smallest_p: the smallest p-value that an exact two-sided permutation test of these seeds can give.
      no_interval: "" if there is an interval.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int | None
    smallest_p: float
    no_interval: str = ""

    @classmethod
    def paired(cls, values: Spread, others: Spread) -> Self | None:
        """Return the mean difference over the seeds that both sides have, or None if there are none.

        The interval is Student's t over the pairs.
        """
        seeds = sorted(values.by_seed.keys() & others.by_seed.keys())
        if not seeds:
            return None
        differences_N = np.array([values.by_seed[seed] - others.by_seed[seed] for seed in seeds])
        pairs = len(seeds)
        mean = float(differences_N.mean())
        smallest_p = 2 / 2**pairs
        if pairs < 2:
            return cls(mean, None, None, pairs, smallest_p, "only one pair of seeds")
        average = student_average(differences_N)
        # Equal differences, up to rounding, would give an interval without width.
        if average.high - average.low < _NO_WIDTH:
            return cls(mean, None, None, pairs, smallest_p, "the difference is the same for all seeds")
        return cls(mean, average.low, average.high, pairs, smallest_p)

    @classmethod
    def independent(cls, values: Spread, others: Spread) -> Self:
        """Return the difference of the means of runs that have nothing in common, with Welch's t interval."""
        mean = values.mean - others.mean
        smallest_p = min(1.0, 2 / math.comb(values.seeds + others.seeds, values.seeds))
        if min(values.seeds, others.seeds) < 2:
            return cls(mean, None, None, None, smallest_p, "only one seed on a side")
        if values.high - values.low < _NO_WIDTH and others.high - others.low < _NO_WIDTH:
            return cls(mean, None, None, None, smallest_p, "all seeds of a side have the same score")
        difference = welch_difference(*(np.array(list(side.by_seed.values())) for side in (values, others)))
        return cls(mean, difference.low, difference.high, None, smallest_p)

    @property
    def direction(self) -> int | None:
        """1 if the interval is above 0, -1 if it is below, 0 if it contains 0, and None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return int(self.low > 0) - int(self.high < 0)


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm at one budget.

    Attributes:
      arm, budget: which.
      planned: number of seeds of the study.
      failed, missing: how many of them failed, or have not finished yet.
      flops, seconds, steps: spent before tuning; None if no seed finished.
      tuning_flops, tuning_seconds, tuning_steps: spent by tuning; None if no seed finished.
      scores: by name.
      differences: by name of the score, then of the reference arm: this arm minus the reference. At the same budget they are
        paired by seed. A reference without a budget is independent: it shares seeds with the first budget at most.
      contrasts: differences between two scores of this arm, paired by seed.
    """

    arm: str
    budget: float | None
    planned: int
    failed: int
    missing: int
    flops: Spread | None
    seconds: Spread | None
    steps: Spread | None
    tuning_flops: Spread | None
    tuning_seconds: Spread | None
    tuning_steps: Spread | None
    scores: Mapping[str, Spread]
    differences: Mapping[str, Mapping[str, Difference]]
    contrasts: Mapping[Contrast, Difference]

    @property
    def finished(self) -> int:
        """The number of seeds that finished."""
        return self.planned - self.failed - self.missing


def compare_arms(study: StudyOutcomes) -> list[Row]:
    """Return a row for each arm and budget: those without a budget first, then by budget, arms in the order of the study."""
    order = [arm.name for arm in study.arms]
    units = [
        *(outcome.unit for outcome in study.outcomes),
        *(failure.unit for failure in study.failures),
        *study.missing,
    ]
    groups = sorted({(unit.budget or 0.0, order.index(unit.arm)) for unit in units})
    return [_row(study, order[index], budget or None) for budget, index in groups]


def _row(study: StudyOutcomes, arm: str, budget: float | None) -> Row:
    finished = outcomes_of(study, arm, budget)
    failed = sum((failure.arm, failure.budget) == (arm, budget) for failure in study.failures)
    missing = sum((unit.arm, unit.budget) == (arm, budget) for unit in study.missing)
    names = score_names(finished)
    scores = {name: _scores(finished, name) for name in names}
    references = {
        reference: outcomes_of(study, reference, budget) or outcomes_of(study, reference, None)
        for reference in study.references
        if reference != arm
    }
    differences: dict[str, dict[str, Difference]] = {}
    for name in names:
        by_reference = {
            reference: _difference(scores[name], _scores(others, name), same_budget=others[0].budget == budget)
            for reference, others in references.items()
            if any(name in other.scores for other in others)
        }
        differences[name] = {reference: found for reference, found in by_reference.items() if found}
    contrasts = {
        contrast: Difference.paired(scores[contrast.score], scores[contrast.minus])
        for contrast in study.contrasts
        if contrast.score in scores and contrast.minus in scores
    }

    def spent(name: str) -> Spread | None:
        return Spread({outcome.seed: getattr(outcome, name) for outcome in finished}) if finished else None

    return Row(
        arm=arm,
        budget=budget,
        planned=len(finished) + failed + missing,
        failed=failed,
        missing=missing,
        flops=spent("flops"),
        seconds=spent("seconds"),
        steps=spent("steps"),
        tuning_flops=spent("tuning_flops"),
        tuning_seconds=spent("tuning_seconds"),
        tuning_steps=spent("tuning_steps"),
        scores=scores,
        differences=differences,
        contrasts={contrast: found for contrast, found in contrasts.items() if found},
    )


def measured_contrasts(study: StudyOutcomes, rows: Iterable[Row]) -> list[Contrast]:
    """Return the contrasts for which some row has both scores."""
    return [contrast for contrast in study.contrasts if any(contrast in row.contrasts for row in rows)]


def outcomes_of(study: StudyOutcomes, arm: str, budget: float | None) -> list[Outcome]:
    """Return the finished units of an arm at a budget."""
    return [outcome for outcome in study.outcomes if (outcome.arm, outcome.budget) == (arm, budget)]


def score_names(outcomes: Iterable[Outcome]) -> list[str]:
    """Return the names of all scores: questions last, and otherwise in the order in which they occur."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
    return sorted(names, key=lambda name: name.startswith("questions/"))


def score_group(name: str) -> str:
    """Return what evaluated a score: "next_token", the name of another evaluation, or "questions"."""
    first = name.partition("/")[0]
    return "next_token" if first in ("direct", "reasoning") else first


def score_groups(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """Return the names of all scores by group."""
    groups = collections.defaultdict(list)
    for name in score_names(outcomes):
        groups[score_group(name)].append(name)
    return dict(groups)


def _scores(outcomes: Iterable[Outcome], name: str) -> Spread:
    return Spread({outcome.seed: outcome.scores[name].value for outcome in outcomes if name in outcome.scores})


def _difference(values: Spread, others: Spread, same_budget: bool) -> Difference | None:
    return Difference.paired(values, others) if same_budget else Difference.independent(values, others)
