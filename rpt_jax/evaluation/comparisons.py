"""Suites that read two finished evaluations: "compare" and "patterns"."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.evaluation.patterns import KEYWORDS, MATCHES, count_runs, distinct_share, pattern_shares, template_share
from rpt_jax.evaluation.statistics import compare, micro_average
from rpt_jax.evaluation.stored_results import Record, read_results
from rpt_jax.evaluation.suite import SUITES, clusters_of, measures, percent, points, scores_of
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.console import table
from rpt_jax.infra.disk import check_writable
from rpt_jax.infra.plots import write_bar_plot
from rpt_jax.infra.run_format import format_stamp

logger = logging.getLogger(__name__)

_FIELD = "--results"
COMPARISON = "comparison.json"
PATTERNS = "patterns.json"
# Fields of a record that say what was asked: of questions, and of positions.
_ASKED = ("question", "answers", "context", "truth")


@SUITES.register("compare", policy=False)
def compare_results(first: Path, second: Path, workdir: Path) -> dict[str, Any]:
    """Paired differences of two evaluations on the same questions, with paired intervals, and McNemar's exact test.

    Args:
      first, second: directories of the evaluations.
      workdir: `comparison.json` is written here.

    Returns: its content.

    Raises: UserError, if they are no finished evaluations, have no question and measure in common, or other questions by the
      same names.
    """
    (summary_a, records_a), (summary_b, records_b) = _read(first, second, workdir)
    by_id = {record["id"]: record for record in records_b}
    a = [record for record in records_a if record["id"] in by_id]
    b = [by_id[record["id"]] for record in a]
    for one, other in zip(a, b, strict=True):
        if different := [name for name in _ASKED if one.get(name) != other.get(name)]:
            raise UserError(
                f"{_FIELD}: {first} and {second} have other questions or positions: '{one['id']}' differs in its {different[0]}. "
                "Evaluate both with the same config.",
                field=_FIELD,
            )
    common = [measure for measure in measures(a) if measure in measures(b)]
    if not common:
        raise UserError(
            f"{_FIELD}: {first} and {second} have no question and measure in common: evaluate both with the same suite, the same "
            "questions and the same samples.",
            field=_FIELD,
        )
    if len(a) < max(len(records_a), len(records_b)):
        logger.warning("Only %s questions are in both evaluations.", f"{len(a):,}")
    categories = [record["category"] for record in a]
    result = {
        **format_stamp(),
        "policies": [summary_a["policy"], summary_b["policy"]],
        "results": [str(first), str(second)],
        "comparisons": {
            measure: compare(scores_of(a, measure), scores_of(b, measure), categories, clusters_of(a))._asdict()
            for measure in common
        },
    }
    atomic_write(workdir / COMPARISON, json.dumps(result, indent=1) + "\n")
    rows = [_comparison_row(measure, values) for measure, values in result["comparisons"].items()]
    title = f"{summary_b['policy']} minus {summary_a['policy']} (points, 95 % interval)"
    table(
        title,
        ("measure", "difference", "macro difference", "only first", "only second", "McNemar p", "detectable", "count"),
        rows,
    )
    logger.info("Results: %s", workdir / COMPARISON)
    return result


@SUITES.register("patterns", policy=False)
def compare_patterns(first: Path, second: Path, workdir: Path) -> dict[str, Any]:
    """Shares of responses with keywords of reasoning in two evaluations, of two policies or of two kinds of prompts.

    Args:
      first, second: directories of the evaluations.
      workdir: `patterns.json` and `patterns.png` are written here.

    Returns: the content of `patterns.json`.

    Raises: UserError, if they are no finished evaluations, or have no responses.
    """
    sides = []
    responses_of_sides = []
    for directory, (summary, records) in zip((first, second), _read(first, second, workdir), strict=True):
        if not records or "responses" not in records[0]:
            raise UserError(
                f"{_FIELD}: {directory} has no responses: its suite '{summary['suite']}' does not sample any.",
                field=_FIELD,
            )
        responses = [response for record in records for response in record["responses"]]
        responses_of_sides.append(responses)
        sides.append(
            _describe(records, responses)
            | {"policy": summary["policy"], "suite": summary["suite"], "results": str(directory)}
        )
    # Both sides by as many runs of words; 0 if a side has none.
    for n in (1, 2, 3):
        runs_of_sides = [count_runs(responses, n) for responses in responses_of_sides]
        drawn = min(runs.total() for runs in runs_of_sides)
        for side, runs in zip(sides, runs_of_sides, strict=True):
            side[f"distinct-{n}"] = distinct_share(runs, drawn) if drawn else 0.0
    a, b = sides
    result = {**format_stamp(), "first": a, "second": b}
    atomic_write(workdir / PATTERNS, json.dumps(result, indent=1) + "\n")

    rows = [
        (group, match, percent(a[match][group]), percent(b[match][group]), _relative(a[match][group], b[match][group]))
        for match in MATCHES
        for group in KEYWORDS
    ]
    rows += [(name, "", f"{a[name]:.3f}", f"{b[name]:.3f}", "") for name in a if isinstance(a[name], float)]
    # Both may be of the same suite and policy, with other prompts.
    names = [
        f"{place}: {side['suite']}, {side['policy']}" for place, side in zip(("first", "second"), sides, strict=True)
    ]
    table("Responses with a keyword (%, 95 % interval)", ("group", "match", *names, "change"), rows)
    bars = {
        name: [side["substring"][group]["mean"] for group in KEYWORDS] for name, side in zip(names, sides, strict=True)
    }
    write_bar_plot(workdir / "patterns.png", "Reasoning patterns", "responses with a keyword", list(KEYWORDS), bars)
    logger.info("Results: %s", workdir / PATTERNS)
    return result


def _read(first: Path, second: Path, workdir: Path) -> list[tuple[dict[str, Any], list[Record]]]:
    """Return the summaries and records of both evaluations, and create the workdir. Raises: UserError."""
    results = [read_results(directory, _FIELD) for directory in (first, second)]
    check_writable(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    return results


def _describe(records: Sequence[Record], responses: Sequence[str]) -> dict[str, Any]:
    """Return the share of responses with a keyword by way of matching and group, and of those with the commonest opening.

    Args:
      records: of an evaluation.
      responses: all responses of the records, in order.
    """
    # Samples of one question are not independent.
    question_N = np.repeat(np.arange(len(records)), [len(record["responses"]) for record in records])
    shares = {
        match: {
            group: micro_average(contains_N, question_N)._asdict()
            for group, contains_N in pattern_shares(responses, match).items()
        }
        for match in MATCHES
    }
    return {
        **shares,
        "template_share": template_share(responses),
        "responses": len(responses),
    }


def _relative(a: dict[str, float], b: dict[str, float]) -> str:
    return f"{100 * (b['mean'] / a['mean'] - 1):+.1f} %" if a["mean"] else "-"


def _comparison_row(measure: str, values: dict[str, Any]) -> tuple[str, ...]:
    micro = points(values["difference"], values["low"], values["high"])
    macro = points(values["macro_difference"], values["macro_low"], values["macro_high"])
    p = "-" if values["mcnemar_p"] is None else f"{values['mcnemar_p']:.3g}"
    counts = (f"{values[name]:,}" for name in ("only_a", "only_b"))
    detectable = "-" if values["detectable"] is None else f"{100 * values['detectable']:.1f}"
    return (measure, micro, macro, *counts, p, detectable, f"{values['count']:,}")
