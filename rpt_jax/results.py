"""The result of a run: `result.json`, tables of accuracies, and rollouts as text."""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from rpt_jax.config import Experiment
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.distributed.processes import to_host
from rpt_jax.evaluation.suite import difficulty_text
from rpt_jax.infra.accounting import Clock
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.console import RolloutText, table
from rpt_jax.infra.provenance import provenance
from rpt_jax.infra.storage import named_by_urls
from rpt_jax.infra.workdir import RESULT
from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.rewards.responses import split_response, status_name
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.dynamic_sampling import first_prompts
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def write_result(
    workdir: Path, experiment: Experiment, evaluations: dict[str, Any], *, steps: int, flops: float, clock: Clock
) -> None:
    """Write `result.json`, the last file of a complete run.

    Args:
      workdir: directory of the run.
      experiment: the config.
      evaluations: what it says about the evaluations before and after training.
      steps: number of completed steps.
      flops: model FLOPs of training, see `accounting.Counters`.
      clock: of the run.
    """
    result = {
        **provenance(),
        "processes": jax.process_count(),
        "wall_seconds": clock.seconds,
        "flops": flops,
        "seconds": clock.training_seconds,
        "steps": steps,
        "seed": experiment.seed,
        "config": named_by_urls(experiment),
        **evaluations,
    }
    atomic_write(workdir / RESULT, json.dumps(result, indent=1) + "\n")


def next_token_result(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what `result.json` says about evaluations of `evaluation.next_token.Evaluator.full` before and after training."""
    evaluations = {"before": before, "after": after}
    return {
        "details": {name: evaluation.get("details") for name, evaluation in evaluations.items()},
        "unseen": {name: evaluation.get("unseen") for name, evaluation in evaluations.items()},
        **{
            name: {mode: evaluation[mode] for mode in ("direct", "reasoning")}
            for name, evaluation in evaluations.items()
        },
    }


def show_next_token_evaluations(evaluations: Mapping[str, dict[str, Any]]) -> None:
    """Show one table of the accuracies of evaluations with 95 % intervals and numbers of positions, by difficulty.

    Args:
      evaluations: "before" training and, at its end, "after" it, as `Evaluator.full` returns them.
    """
    title = "Next-token accuracy"
    rows = []
    for part, suffix in (("", ""), ("unseen", ", unseen")):
        for mode in ("direct", "reasoning"):
            for name, evaluation in evaluations.items():
                results = (evaluation.get(part) or {}) if part else evaluation
                if mode in results:
                    rows.append((f"{mode}{suffix}, {name}", *_accuracies(results[mode])))
    for name, evaluation in evaluations.items():
        if "exact" in evaluation["details"]:
            title = "Share of segments"
            rows.append((f"reasoning, whole, {name}", *_accuracies(evaluation["details"]["exact"])))
    table(
        f"{title}, {' and '.join(evaluations)} training (%, 95 % interval, positions)",
        ("predicted", *DIFFICULTIES),
        rows,
    )
    for name, evaluation in evaluations.items():
        details = evaluation["details"]
        logger.info(
            "%s training: format rate %.1f%%, response length %.1f tokens",
            name.capitalize(),
            100 * details["format_rate"],
            details["response_length"],
        )


def _accuracies(by_level: Mapping[str, dict[str, Any]]) -> list[str]:
    return [difficulty_text(by_level[level]) for level in DIFFICULTIES]


def rollout_texts(
    rewarded: RewardedRollouts,
    tokenizer: Tokenizer,
    statuses: type[enum.IntEnum],
    truths: Callable[[PromptBatch], list[bytes]],
    count: int,
) -> list[RolloutText]:
    """Return the first sample of each of the first `count` prompts as text.

    Args:
      rewarded: the rollouts.
      tokenizer: gives the bytes of tokens.
      statuses: the values of `status_PxG`.
      truths: returns what a right prediction is for each prompt.
      count: number of prompts.
    """
    rows = to_host(first_prompts(rewarded, count))
    texts = []
    for i, truth in enumerate(truths(rows.prompts)):
        response = rows.rollouts.tokens_PxGxT[i, 0, : rows.rollouts.lengths_PxG[i, 0]].tolist()
        reasoning, prediction = split_response(tokenizer.response_bytes(response))
        texts.append(
            RolloutText(
                prompt=tokenizer.token_bytes(rows.prompts.tokens_PxS[i, : rows.prompts.lengths_P[i]]),
                reasoning=reasoning,
                prediction=prediction,
                truth=truth,
                reward=float(rows.reward_PxG[i, 0]),
                status=status_name(statuses(rows.status_PxG[i, 0])),
            )
        )
    return texts
