"""What a study found in a sentence or two, and what its differences do not show."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence

from rpt_jax.evaluation.statistics import CONFIDENCE
from rpt_jax.infra.scaling_laws import LEAST_POINTS
from rpt_jax.study.comparison import Difference, Row
from rpt_jax.study.formatting import budget_text, difference_text, percent, score_title
from rpt_jax.study.outcome import StudyOutcomes

LEAST_SEEDS = 3
LARGEST_MISMATCH = 0.05  # Relative difference of the compute of two arms that are called matched.

GENERAL_LIMITS = (
    "One base policy, one corpus and one size were studied. The order of the arms may be another for other ones.",
    "Each arm has the hyperparameters of its config. An arm that was tuned with more care than another has an advantage that "
    "equal compute does not take away.",
    "Intervals are over seeds: they show what another seed of the same study would do. The questions and positions of the test "
    "are the same for all seeds.",
    "Student's t interval takes differences over seeds as normally distributed, which a handful of seeds cannot check.",
    "FLOPs are model FLOPs. Arms that spend equal FLOPs can differ in seconds, in memory and in how well they use a device.",
)


# --- headline -----------------------------------------------------------------------------------------


def headline(study: StudyOutcomes, rows: Sequence[Row]) -> list[str]:
    """Return what the main score says at the largest budget that has results, one sentence for each reference arm."""
    measured = [row for row in rows if study.main_score in row.scores]
    if not measured:
        return [f"No unit has the main score, {score_title(study.main_score)}, yet."]
    largest = max(row.budget or 0.0 for row in measured) or None
    at_largest = [row for row in measured if row.budget == largest]
    title = f"{score_title(study.main_score)}, {budget_text(largest, study.matched_by)}"
    sentences = []
    for reference in study.references:
        by_direction: dict[int | None, list[str]] = collections.defaultdict(list)
        for row in at_largest:
            difference = row.differences[study.main_score].get(reference)
            if difference is not None:
                by_direction[difference.direction].append(f"{row.arm} {difference_text(difference)}")
        verdicts = [
            f"{words} {', '.join(by_direction[direction])}"
            for direction, words in (
                (0, "no difference is shown for"),
                (-1, "worse is"),
                (1, "better is"),
                (None, "too few seeds to say for"),
            )
            if by_direction[direction]
        ]
        if verdicts:
            sentences.append(f"Compared with {reference} ({title}), in points: {'; '.join(verdicts)}.")
    return sentences or [f"No arm can be compared with {' or '.join(study.references)} yet."]


# --- limits -------------------------------------------------------------------------------------------


def limits(study: StudyOutcomes, rows: Sequence[Row]) -> list[str]:
    """Return what the differences of this study do not show, and then what no study of this kind shows."""
    return [
        *_incomplete(study, rows),
        *_few_seeds(study, rows),
        *_not_shown(study, rows),
        *_several_comparisons(rows),
        *_test_uncertainty(study),
        *_unmatched(study, rows),
        *_scaling(study),
        *GENERAL_LIMITS,
    ]


def _incomplete(study: StudyOutcomes, rows: Sequence[Row]) -> Iterator[str]:
    lacking = [row for row in rows if row.finished < row.planned]
    if lacking:
        yield (
            f"Not all seeds finished: {_names(study, lacking)}. Their means are over the seeds that did; if an arm's weak seeds "
            "fail more often, its mean is too good."
        )


def _few_seeds(study: StudyOutcomes, rows: Sequence[Row]) -> Iterator[str]:
    few = [row for row in rows if 0 < row.finished < LEAST_SEEDS]
    if few:
        yield f"Fewer than {LEAST_SEEDS} seeds: {_names(study, few)}. Their spread is hardly known."
    smallest_p = max((each.smallest_p for _, _, _, each in _differences(rows) if each.low is not None), default=0.0)
    if smallest_p > 1 - CONFIDENCE:
        yield (
            f"An exact permutation test of the differences with the fewest seeds cannot give a p-value below {smallest_p:.3g}: "
            "intervals that exclude 0 rest on the normal distribution."
        )


def _not_shown(study: StudyOutcomes, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence for each score with intervals that contain 0."""
    found = [
        (score, f"{_name(study, row)} minus {reference}")
        for row, score, reference, difference in _differences(rows)
        if difference.direction == 0
    ]
    for score, group in itertools.groupby(sorted(found, key=lambda item: item[0]), key=lambda item: item[0]):
        names = "; ".join(name for _, name in group)
        yield (
            f"In {score_title(score)}, no difference is shown, because the interval contains 0: {names}. That does not show that "
            "there is none."
        )


def _several_comparisons(rows: Sequence[Row]) -> Iterator[str]:
    shown = [difference for _, _, _, difference in _differences(rows)]
    shown += [difference for row in rows for difference in row.contrasts.values()]
    intervals = sum(difference.direction is not None for difference in shown)
    if intervals > 1:
        yield (
            f"There are {intervals} intervals, without a correction for their number. Without any true difference, about "
            f"{0.05 * intervals:.1f} of them would exclude 0. The main score was chosen before the study; the others are "
            "exploratory."
        )


def _test_uncertainty(study: StudyOutcomes) -> Iterator[str]:
    widest: dict[str, tuple[float, int]] = {}
    for outcome in study.outcomes:
        for name, score in outcome.scores.items():
            widest[name] = max(widest.get(name, (0.0, 0)), ((score.high - score.low) / 2, score.count))
    if widest:
        parts = [f"{score_title(name)} ± {percent(half)} ({count:,})" for name, (half, count) in widest.items()]
        yield (
            "The test is a sample too. The largest half width of an evaluation's own 95 % interval, in points, and the number of "
            f"questions or positions: {'; '.join(parts)}. The intervals over seeds do not contain this."
        )


def _unmatched(study: StudyOutcomes, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence if arms of a budget spent more or less than it."""
    found = []
    for row in rows:
        spent = row.flops if study.matched_by == "flops" else row.seconds
        if row.budget is not None and spent is not None:
            relative = spent.mean / row.budget - 1
            if abs(relative) > LARGEST_MISMATCH:
                found.append(f"{_name(study, row)} {relative:+.0%}")
    if found:
        yield (
            f"Compute is not matched: the mean differs from the budget by more than {LARGEST_MISMATCH:.0%} for "
            f"{'; '.join(found)}."
        )


def _scaling(study: StudyOutcomes) -> Iterator[str]:
    budgets = study.budgets()
    if len(budgets) < LEAST_POINTS:
        yield (
            f"How scores scale with compute is not fitted: three parameters need at least {LEAST_POINTS} budgets, and the study "
            f"has {len(budgets)}."
        )


def _differences(rows: Iterable[Row]) -> Iterator[tuple[Row, str, str, Difference]]:
    """Yield every difference with its row, its score and its reference; that of two references once, from the first row."""
    seen = set()
    for row in rows:
        for score, by_reference in row.differences.items():
            for reference, difference in by_reference.items():
                pair = (score, row.budget, frozenset((row.arm, reference)))
                if pair not in seen:
                    seen.add(pair)
                    yield row, score, reference, difference


def _name(study: StudyOutcomes, row: Row) -> str:
    return row.arm if row.budget is None else f"{row.arm} ({budget_text(row.budget, study.matched_by)})"


def _names(study: StudyOutcomes, rows: Sequence[Row]) -> str:
    return ", ".join(_name(study, row) for row in rows)
