"""Accuracy on questions with verifiable answers: avg@k, pass@k, length, format and what verifying took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.distributed.processes import to_host
from rpt_jax.evaluation.statistics import averages, micro_average, pass_at_k, powers_of_two
from rpt_jax.infra.console import Progress, table
from rpt_jax.infra.overlap import start_one_ahead
from rpt_jax.model.transformer import Params
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.question_prompts import QuestionPrompts, question_batches
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier, PendingBatch, VerifiedBatch
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler

logger = logging.getLogger(__name__)


class SampledBatch(NamedTuple):
    """G responses to each of P questions.

    Attributes:
      prompts: the prompts, on the host.
      verified: what the verifiers found out.
      lengths_PxG: int32 response lengths in tokens.
      truncated_PxG: bool, whether the length limit cut the response.
      sampling_seconds: seconds that the devices took to sample the responses.
    """

    prompts: PromptBatch
    verified: VerifiedBatch
    lengths_PxG: np.ndarray
    truncated_PxG: np.ndarray
    sampling_seconds: float


def sample_and_verify(
    sample: Sampler,
    verify: BatchVerifier,
    params: Params,
    questions: QuestionPrompts,
    batches: Sequence[PromptBatch],
    keep: Callable[[RewardedRollouts], None] | None = None,
) -> Iterator[SampledBatch]:
    """Yield responses to batches of questions. The responses to a batch are verified while those to the next one are sampled.

    Args:
      sample: samples the responses.
      verify: verifies them.
      params: of the policy, sharded for training.
      questions: that the prompts ask.
      batches: the prompts.
      keep: called with the responses to each batch, on the host.
    """
    weights = sample.weights(params)

    def start(prompts: PromptBatch) -> tuple[PromptBatch, Rollouts, PendingBatch, float]:
        began = time.monotonic()
        rollouts, _ = sample(weights, prompts, EVALUATION_STEP)
        seconds = time.monotonic() - began
        return prompts, rollouts, verify.submit(questions.of(prompts), rollouts), seconds

    def finish(started: tuple[PromptBatch, Rollouts, PendingBatch, float]) -> SampledBatch:
        prompts, rollouts, pending, seconds = started
        lengths_PxG, ended_PxG = to_host((rollouts.lengths_PxG, rollouts.ended_PxG))
        verified = pending.result()
        if keep is not None:
            keep(RewardedRollouts(*to_host((prompts, rollouts, verified.score_PxG, verified.status_PxG))))
        return SampledBatch(
            prompts=prompts,
            verified=verified,
            lengths_PxG=lengths_PxG,
            truncated_PxG=ended_PxG == Ended.LENGTH,
            sampling_seconds=seconds,
        )

    return start_one_ahead(batches, start, finish)


class QuestionEvaluator:
    """Measures the accuracy of policies on the same questions, with the same noise."""

    def __init__(
        self, sample: Sampler, verify: BatchVerifier, questions: QuestionPrompts, builder: PromptBuilder, batch: int
    ):
        """
        Args:
          sample: samples the responses.
          verify: verifies them.
          questions: the test questions.
          builder: builds their prompts.
          batch: prompts in a batch.
        """
        self._sample = sample
        self._verify = verify
        self._questions = questions
        self._batches = question_batches(questions, builder, batch)

    def __call__(self, params: Params, keep: Callable[[RewardedRollouts], None] | None = None) -> dict[str, Any]:
        """Return the results of a policy as JSON values, see `question_results`.

        Args:
          params: of the policy, sharded for training.
          keep: called with the responses to each batch of questions, on the host.
        """
        start = time.monotonic()
        done = []
        with Progress("evaluate, batches", len(self._batches), transient=True) as progress:
            for batch in sample_and_verify(self._sample, self._verify, params, self._questions, self._batches, keep):
                done.append(batch)
                progress.advance()
        return question_results(self._questions, done, time.monotonic() - start)


def question_results(questions: QuestionPrompts, batches: Sequence[SampledBatch], seconds: float) -> dict[str, Any]:
    """Return the accuracy of responses and what describes them, as JSON values.

    Args:
      questions: the N questions.
      batches: responses to all of them, in their order; what pads the last batch is ignored.
      seconds: that it took to sample and verify the responses.

    Returns: "accuracy" (avg@k: the mean score, with "micro", "macro" and "categories" as of `statistics.averages`) and "pass", by
      k, each with "mean", "low" and "high"; the numbers of "questions", "samples" a question and of questions "left_out"; the
      fractions "truncated", "format_rate" and "status", by name; the mean "response_length" in tokens; the numbers of
      verifications that "timed_out" or "crashed"; "seconds", "verification_seconds" of all workers, "waited_seconds" for them,
      and "device_busy", the fraction of the seconds that the devices were sampling.
    """
    count = len(questions.questions)

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays)[:count]

    score_NxG = join([batch.verified.score_PxG for batch in batches])
    status_NxG = join([batch.verified.status_PxG for batch in batches])
    correct_NxG = (status_NxG == AnswerStatus.CORRECT).astype(int)
    samples = score_NxG.shape[1]
    has_box_NxG = ~np.isin(status_NxG, (AnswerStatus.NO_BOX, AnswerStatus.NOT_FINISHED))
    categories = [question.category for question in questions.questions]
    verified = [batch.verified for batch in batches]
    return {
        "accuracy": averages(score_NxG.mean(axis=1), categories),
        "pass": {str(k): micro_average(pass_at_k(correct_NxG, k))._asdict() for k in powers_of_two(samples)},
        "questions": count,
        "samples": samples,
        "left_out": questions.left_out,
        "response_length": float(join([batch.lengths_PxG for batch in batches]).mean()),
        "truncated": float(join([batch.truncated_PxG for batch in batches]).mean()),
        "format_rate": float(has_box_NxG.mean()),
        "status": {status.name.lower(): float((status_NxG == status).mean()) for status in AnswerStatus},
        "timed_out": sum(batch.timed_out for batch in verified),
        "crashed": sum(batch.crashed for batch in verified),
        "seconds": seconds,
        "verification_seconds": sum(batch.seconds for batch in verified),
        "waited_seconds": sum(batch.waited for batch in verified),
        "device_busy": sum(batch.sampling_seconds for batch in batches) / max(seconds, 1e-9),
    }


def question_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of `question_results` for metrics.jsonl."""
    accuracy = results["accuracy"]["micro"]
    best = results["pass"][str(results["samples"])]
    scalars = {
        "accuracy": accuracy["mean"],
        "accuracy/low": accuracy["low"],
        "accuracy/high": accuracy["high"],
        "pass": best["mean"],
        "pass/low": best["low"],
        "pass/high": best["high"],
        "length": results["response_length"],
        "truncated": results["truncated"],
        "format_rate": results["format_rate"],
        "timed_out": results["timed_out"],
        "crashed": results["crashed"],
    }
    return {f"eval/questions/{name}": float(value) for name, value in scalars.items()} | {
        "time/evaluation_verification": results["waited_seconds"],
        "speed/evaluation_device_busy": results["device_busy"],
    }


def show_question_results(evaluations: Mapping[str, dict[str, Any]]) -> None:
    """Show one table of accuracies with 95 % intervals, and what describes the responses.

    Args:
      evaluations: results by the name of the policy, such as "before" and "after".
    """
    rows = []
    for measure in dict.fromkeys(measure for results in evaluations.values() for measure in _averages(results)):
        for name, results in evaluations.items():
            if average := _averages(results).get(measure):
                rows.append((f"{measure}, {name}", _format(average), average["count"]))
    names = " and ".join(evaluations)
    table(f"Accuracy on questions, {names} training (%, 95 % interval)", ("measure", "accuracy", "questions"), rows)
    for name, results in evaluations.items():
        logger.info(
            "%s training: format rate %.1f%%, response length %.1f tokens, %.1f%% truncated, %d verifications timed out and %d "
            "crashed",
            name.capitalize(),
            100 * results["format_rate"],
            results["response_length"],
            100 * results["truncated"],
            results["timed_out"],
            results["crashed"],
        )


def _averages(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the averages of a policy by the name of the measure; those of categories if there are several."""
    samples = results["samples"]
    averages = {f"avg@{samples}": results["accuracy"]["micro"]}
    averages |= {f"pass@{k}": average for k, average in results["pass"].items() if k != "1"}
    averages = {name: average | {"count": results["questions"]} for name, average in averages.items()}
    categories = results["accuracy"]["categories"]
    if len(categories) > 1:
        averages |= {f"avg@{samples}, {category}": average for category, average in categories.items()}
    return averages


def _format(average: dict[str, float]) -> str:
    return f"{100 * average['mean']:.1f} ({100 * average['low']:.1f}-{100 * average['high']:.1f})"
