"""Accuracy on questions with verifiable answers: avg@k, pass@k, length, format and what verifying took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rpt_jax.evaluation.batch_loop import DeviceClock, evaluate_batches
from rpt_jax.evaluation.statistics import averages, micro_average, pass_at_k, powers_of_two
from rpt_jax.evaluation.stored_results import Record
from rpt_jax.evaluation.suite import percent
from rpt_jax.infra.console import Progress, table
from rpt_jax.model.transformer import Params
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.question_prompts import QuestionPrompts, question_batches, questions_fingerprint
from rpt_jax.questions.question import Question
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler

logger = logging.getLogger(__name__)


class QuestionSampling(NamedTuple):
    """What responses to questions are sampled with.

    Attributes:
      sample: samples the responses.
      questions: the questions, with their tokens.
      builder: builds their prompts.
      batch: prompts in a batch.
    """

    sample: Sampler
    questions: QuestionPrompts
    builder: PromptBuilder
    batch: int


class SampledQuestions:
    """Questions in batches, to which the devices sample responses."""

    def __init__(self, sampling: QuestionSampling, params: Params, chosen: Sequence[int] | None = None):
        """
        Args:
          sampling: the questions, and what samples responses to them.
          params: of the policy, sharded for training.
          chosen: indices of the questions to ask; None for all.
        """
        self._sampling = sampling
        self._weights = sampling.sample.weights(params)
        self._chosen = range(len(sampling.questions.questions)) if chosen is None else chosen

    @property
    def count(self) -> int:
        """Number of batches."""
        return -(-len(self._chosen) // self._sampling.batch)

    @property
    def fingerprint(self) -> str:
        """Digest of the questions."""
        return questions_fingerprint(self._sampling.questions.questions)

    def of_batch(self, batch: int) -> list[Question]:
        """Return the questions of a batch."""
        return [self._sampling.questions.questions[i] for i in self._indices(batch)]

    def prompts(self, batch: int) -> PromptBatch:
        """Return the prompts of a batch; the last batch is padded by repeating its last prompt."""
        sampling = self._sampling
        [prompts] = question_batches(sampling.questions, sampling.builder, sampling.batch, self._indices(batch))
        return prompts

    def launch(self, batch: int) -> Rollouts:
        """Start to sample responses to the questions of a batch."""
        _, rollouts, _ = self._sampling.sample.launch(self._weights, self.prompts(batch), EVALUATION_STEP)
        return rollouts

    def _indices(self, batch: int) -> Sequence[int]:
        size = self._sampling.batch
        return self._chosen[batch * size : (batch + 1) * size]


class VerifiedQuestions(SampledQuestions):
    """Questions in batches, with what a verifier says about the responses to them.

    Attributes:
      totals: numbers of verifications that "timed_out" or "crashed", "verification_seconds" of all worker processes, and
        "waited_seconds" for them, of the batches that were verified.
    """

    def __init__(
        self,
        sampling: QuestionSampling,
        params: Params,
        verify: BatchVerifier,
        chosen: Sequence[int] | None = None,
        keep: Callable[[RewardedRollouts], None] | None = None,
    ):
        """
        Args:
          sampling, params, chosen: as of `SampledQuestions`.
          verify: verifies the responses.
          keep: called with the responses to each batch, on the host.
        """
        super().__init__(sampling, params, chosen)
        self._verify = verify
        self._keep = keep
        self.totals = dict[str, float](timed_out=0, crashed=0, verification_seconds=0.0, waited_seconds=0.0)

    def verify(self, batch: int, arrays: Rollouts) -> Callable[[], list[Record]]:
        """Start to verify the responses to a batch; return a function that waits for the records.

        A record has the question's "id" and "category", and for each sample its "status", whether it is "correct" and "finished",
        its verifier's "score" and its length in tokens ("lengths").
        """
        questions = self.of_batch(batch)
        pending = self._verify.submit(questions, arrays)

        def records() -> list[Record]:
            verified = pending.result()
            self.totals["timed_out"] += verified.timed_out
            self.totals["crashed"] += verified.crashed
            self.totals["verification_seconds"] += verified.seconds
            self.totals["waited_seconds"] += verified.waited
            if self._keep:
                rewarded = (self.prompts(batch), arrays, verified.score_PxG, verified.status_PxG)
                self._keep(RewardedRollouts(*jax.tree.map(lambda x: x[: len(questions)], rewarded)))
            return [
                {
                    "id": question.id,
                    "category": question.category,
                    "status": [AnswerStatus(status).name.lower() for status in verified.status_PxG[p]],
                    "correct": (verified.status_PxG[p] == AnswerStatus.CORRECT).astype(float).tolist(),
                    "score": verified.score_PxG[p].tolist(),
                    "finished": (arrays.ended_PxG[p] != Ended.LENGTH).tolist(),
                    "lengths": arrays.lengths_PxG[p].tolist(),
                }
                for p, question in enumerate(questions)
            ]

        return records


def evaluate_questions(
    sampling: QuestionSampling,
    params: Params,
    verify: BatchVerifier,
    keep: Callable[[RewardedRollouts], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a policy on questions, always with the same noise.

    Args:
      sampling, params, verify, keep: as of `VerifiedQuestions`.

    Returns: `question_results` and the `VerifiedQuestions.totals`; the number of questions that were "left_out", the "seconds"
      that the evaluation took, and "device_busy", see `DeviceClock.busy_share`.
    """
    start = time.monotonic()
    batches = VerifiedQuestions(sampling, params, verify, keep=keep)
    records = []
    with (
        sampling.sample.explain_out_of_memory(),
        Progress("evaluate, batches", batches.count, transient=True) as progress,
        DeviceClock() as clock,
    ):
        for _, of_batch in evaluate_batches(batches, range(batches.count), clock):
            records += of_batch
            progress.advance()
        busy = clock.busy_share()
    return {
        **question_results(records),
        **batches.totals,
        "left_out": sampling.questions.left_out,
        "seconds": time.monotonic() - start,
        "device_busy": busy,
    }


def question_results(records: Sequence[Record]) -> dict[str, Any]:
    """Return the accuracy of responses and what describes them, as JSON values.

    Args:
      records: of the questions, see `VerifiedQuestions.verify`.

    Returns: "accuracy" (avg@k: the mean score, with "micro", "macro" and "categories" as of `statistics.averages`) and "pass", by
      k, each with "mean", "low" and "high"; the numbers of "questions" and of "samples" a question; the fractions "truncated",
      "format_rate" and "status", by name; the mean "response_length" in tokens.
    """

    def values(name: str) -> np.ndarray:
        """Return a field of the samples of all questions, [N, G]."""
        return np.array([record[name] for record in records])

    score_NxG = values("score")
    correct_NxG = values("correct").astype(int)
    samples = score_NxG.shape[1]
    status = status_shares(records)
    return {
        "accuracy": averages(score_NxG.mean(axis=1), [record["category"] for record in records]),
        "pass": {str(k): micro_average(pass_at_k(correct_NxG, k))._asdict() for k in powers_of_two(samples)},
        "questions": len(records),
        "samples": samples,
        "response_length": float(values("lengths").mean()),
        "truncated": 1.0 - float(values("finished").mean()),
        "format_rate": 1.0 - (status["no_box"] + status["not_finished"]),
        "status": status,
    }


def status_shares(records: Sequence[Record]) -> dict[str, float]:
    """Return the share of the responses that have each status, by its name."""
    statuses = [status for record in records for status in record["status"]]
    return {status.name.lower(): statuses.count(status.name.lower()) / len(statuses) for status in AnswerStatus}


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
                rows.append((f"{measure}, {name}", percent(average), average["count"]))
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
