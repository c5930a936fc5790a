"""Rules about accuracies: what the evaluations of a run can show, and whether they got worse."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.diagnosis.finding import Change, Evidence, Finding, Severity
from rpt_jax.diagnosis.rule import RULES, CannotCheck
from rpt_jax.diagnosis.run_record import RunRecord
from rpt_jax.evaluation.statistics import compare, detectable_difference
from rpt_jax.infra.rollout_files import EVALUATION

_COLUMNS = ("split", "source", "window", "position", "entropy", "reward")
_QUESTIONS = "eval/questions/accuracy"


class Gain(NamedTuple):
    """The difference of an accuracy between the first and the last evaluation.

    Attributes:
      metric: the accuracy.
      before, after: the accuracies.
      low, high: 95 % interval of the difference.
      count: positions or questions; 0 if unknown, because no rollouts were kept.
    """

    metric: str
    before: Evidence
    after: Evidence
    low: float
    high: float
    count: int

    @property
    def difference(self) -> float:
        """Accuracy after minus before."""
        return self.after.value - self.before.value

    @property
    def name(self) -> str:
        """What was evaluated, in words."""
        level = self.metric.rpartition("/")[2]
        return f"at {level} positions" if level in DIFFICULTIES else "on test questions"

    @property
    def detectable(self) -> float:
        """The smallest difference that this evaluation finds with a probability of 80 %."""
        return detectable_difference(self.low, self.high)

    def __str__(self) -> str:
        return (
            f"{100 * self.before.value:.1f} to {100 * self.after.value:.1f} % {self.name} (difference "
            f"{100 * self.difference:+.1f} points, 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"
        )


@RULES.register("evaluation_too_small", tasks=("rpt", "rft"))
def evaluation_too_small(run: RunRecord) -> Iterator[Finding]:
    """The interval of the accuracy's gain includes 0: the evaluation is too small to show it."""
    gains = list(_gains(run))
    # The levels of difficulty are nested: the first one has all positions.
    unclear = [gain for gain in gains if gain.low <= 0 <= gain.high and gain.low < gain.high]
    if not unclear:
        return
    gain = unclear[0]
    sentence = (
        f"The evaluation is too small to show a gain: accuracy went from {gain}. It finds gains of {100 * gain.detectable:.1f} "
        "points or more with a probability of 80 %"
    )
    if gain.difference > 0 and gain.count:
        needed = gain.count * (gain.detectable / gain.difference) ** 2
        sentence += f"; for this one, it would need about {float(f'{needed:.2g}'):,.0f} in place of {gain.count:,}"
    claimed = gain.difference > 0 and gain == gains[0]
    yield Finding(
        severity=Severity.WARNING if claimed else Severity.NOTE,
        sentence=f"{sentence}.",
        evidence=(gain.before, gain.after),
        changes=_larger_evaluation(run),
    )


@RULES.register("accuracy_fell", tasks=("rpt", "rft"))
def accuracy_fell(run: RunRecord) -> Iterator[Finding]:
    """The accuracy on held-out data is lower than before training, and the interval of the difference says so."""
    fell = [gain for gain in _gains(run) if gain.high < 0]
    if fell:
        yield Finding(
            severity=Severity.PROBLEM,
            sentence=f"Training made the policy worse: accuracy fell from {fell[0]}.",
            evidence=(fell[0].before, fell[0].after),
            changes=(run.lowered("optimizer.learning_rate"),),
        )


def _larger_evaluation(run: RunRecord) -> tuple[Change, ...]:
    if run.task == "rft":
        return (run.raised("questions.test_questions"),)
    return (run.raised("evaluation.positions"), run.raised("data.held_out_documents"))


def _gains(run: RunRecord) -> Iterator[Gain]:
    """Yield the gain of each accuracy from the first evaluation to the last one, in the second half of the run.

    With the rollouts of both evaluations, the interval is that of paired differences, with documents as the independent units
    (`evaluation.statistics.compare`). Without them, it is that of two independent evaluations, from their own intervals, and
    too wide, because the positions are the same.

    Raises: CannotCheck, if there are no two such evaluations.
    """
    metrics = (_QUESTIONS,) if run.task == "rft" else tuple(f"eval/reasoning/{level}" for level in DIFFICULTIES)
    lines = [line for line in run.lines if any(f"{metric}/high" in line for metric in metrics)]
    if len(lines) < 2 or lines[0]["step"] != 0:
        raise CannotCheck("metrics.jsonl has no evaluation before training and one after it")
    before, after = lines[0], lines[-1]
    if 2 * after["step"] < run.total_steps:
        raise CannotCheck("no evaluation of the second half of the run is in metrics.jsonl")
    for metric in metrics:
        if metric not in before or metric not in after:
            continue
        first, last = (Evidence(metric, line[metric], int(line["step"]), int(line["step"])) for line in (before, after))
        if paired := _paired_gain(run, first, last):
            yield paired
        else:
            half_width = math.hypot(*((line[f"{metric}/high"] - line[f"{metric}/low"]) / 2 for line in (before, after)))
            difference = last.value - first.value
            yield Gain(metric, first, last, difference - half_width, difference + half_width, 0)


def _paired_gain(run: RunRecord, before: Evidence, after: Evidence) -> Gain | None:
    """Return the gain with the interval of paired differences; None without that, or without the rollouts of both evaluations."""
    try:
        before_scores, after_scores = (_scores(run, before.metric, last=last) for last in (False, True))
    except CannotCheck:
        return None
    common = [key for key in before_scores if key in after_scores]
    before_N, after_N = (np.array([scores[key] for key in common]) for scores in (before_scores, after_scores))
    # The files must be those of the two evaluations, with the same measure.
    if not common or not np.allclose([before_N.mean(), after_N.mean()], [before.value, after.value], atol=1e-4):
        return None
    sources = {source: i for i, source in enumerate(dict.fromkeys(key[0] for key in common))}
    cluster_N = np.array([sources[key[0]] for key in common])
    comparison = compare(before_N, after_N, [""] * len(common), cluster_N)
    if comparison.low is None or comparison.high is None:
        return None
    return Gain(before.metric, before, after, comparison.low, comparison.high, len(common))


def _scores(run: RunRecord, metric: str, *, last: bool) -> dict[tuple[str, int, int], float]:
    """Return the mean reward at each held-out position, or for each question, of a kept evaluation. Raises: CannotCheck."""
    least_entropy = DIFFICULTIES.get(metric.rpartition("/")[2])
    rewards: dict[tuple[str, int, int], list[float]] = collections.defaultdict(list)
    for row in run.rollouts(EVALUATION, _COLUMNS, last=last):
        is_wanted = row["split"] == "test" if least_entropy is None else row["entropy"] > least_entropy
        if is_wanted and row["split"] != "unseen":
            rewards[row["source"], row["window"], row["position"]].append(row["reward"])
    return {key: float(np.mean(values)) for key, values in rewards.items()}
