"""What a suite of the command `evaluate` is: batches of records, and a summary of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.evaluation.batch_loop import Batches
from rpt_jax.evaluation.statistics import averages
from rpt_jax.evaluation.stored_results import Record
from rpt_jax.infra.run_context import RunContext
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.registry import Registry, Requirements
from rpt_jax.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteRequirements(Requirements):
    """Requirements of a suite of the command `evaluate`.

    Attributes:
      policy: whether it runs a policy; if not, it reads the results of finished evaluations.
      questions: whether it asks questions, of section `questions`.
      sampling: returns the experiment with the section `rollout` that the suite samples with; None for that of evaluations.
    """

    policy: bool = True
    questions: bool = False
    sampling: Callable[[Experiment], Experiment] | None = None


SUITES = Registry(
    "--suite",
    (
        "rpt_jax.evaluation.next_token_suite",
        "rpt_jax.evaluation.altered_reasoning",
        "rpt_jax.evaluation.question_suites",
        "rpt_jax.evaluation.comparisons",
    ),
    SuiteRequirements,
)


class SuiteInputs(NamedTuple):
    """What a suite is made from.

    Attributes:
      experiment: the config; `policy.path` is the config's own, which need not be the evaluated policy's.
      policy: the policy that is evaluated.
      params: its parameters.
      tokenizer: its tokenizer.
      mesh: the devices.
      workdir: of the evaluation.
      context: signals and heartbeats.
    """

    experiment: Experiment
    policy: Transformer
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    workdir: Path
    context: RunContext


class Suite(Batches, Protocol):
    """What the command evaluates.

    Each record has an "id", a "category" ("" for none), a "cluster" (an integer, where records depend on each other) and
    "scores": numbers in [0, 1] by the name of the measure.
    """

    @property
    def fingerprint(self) -> str:
        """Digest of what is evaluated: the questions or the positions."""
        ...

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return what is reported about all records beside the averages of their scores, as JSON values."""
        ...


def score_averages(records: Sequence[Record]) -> dict[str, Any]:
    """Return the averages of each measure, see `statistics.averages`, by its name."""
    categories = [record["category"] for record in records]
    return {
        measure: averages(scores_of(records, measure), categories, clusters_of(records))
        for measure in measures(records)
    }


def measures(records: Sequence[Record]) -> list[str]:
    """Return the names of the measures of some records."""
    return list(records[0]["scores"]) if records else []


def scores_of(records: Sequence[Record], measure: str) -> np.ndarray:
    """Return the scores of a measure, float [N]."""
    return np.array([record["scores"][measure] for record in records], float)


def clusters_of(records: Sequence[Record]) -> np.ndarray | None:
    """Return the cluster of each record, [N]; None if each is its own."""
    if not records or "cluster" not in records[0]:
        return None
    return np.array([record["cluster"] for record in records])


def percent(average: Mapping[str, float]) -> str:
    """Return a mean and its interval in percent: "41.2 (38.0-44.4)"."""
    return f"{100 * average['mean']:.1f} ({100 * average['low']:.1f}-{100 * average['high']:.1f})"


def difficulty_text(result: Mapping[str, Any]) -> str:
    """Return the accuracy of a difficulty level, its interval and its positions: "41.2 (38.0-44.4), 224"."""
    if not result["positions"]:
        return "no positions"
    return f"{percent({**result, 'mean': result['accuracy']})}, {result['positions']}"


def points(difference: float, low: float | None, high: float | None) -> str:
    """Return a difference and its interval in percentage points, with their signs: "+2.1 (-0.4 to +4.6)"."""
    if low is None or high is None:
        return f"{100 * difference:+.1f} (no interval)"
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def summary_rows(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of a table for each measure and category: its name, the mean with its interval in percent, and the count."""
    rows = []
    for measure, result in scores.items():
        rows.append((measure, percent(result["micro"]), f"{result['micro']['count']:,}"))
        if len(result["categories"]) > 1:
            rows.append(
                (f"{measure}, macro average", percent(result["macro"]), f"{result['macro']['count']:,} categories")
            )
            rows += [
                (f"{measure}, {category or '(none)'}", percent(average), f"{average['count']:,}")
                for category, average in result["categories"].items()
            ]
    return rows
