"""The reward of responses to questions: whether a verifier accepts the answer.

The verifiers run in worker processes on the host while the devices go on: `submit` returns at once, and `result` waits.
"""

from __future__ import annotations

import enum
import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from rpt_jax.config import Experiment, QuestionsConfig
from rpt_jax.config.derived import sampling_fields
from rpt_jax.distributed.processes import gather_rows, is_leader, to_host
from rpt_jax.infra.fingerprint import fingerprint_arrays
from rpt_jax.model.transformer import Params
from rpt_jax.prompts.builder import read_template
from rpt_jax.questions.difficulty import DifficultyFilter
from rpt_jax.questions.loading import QuestionSets, load_questions
from rpt_jax.questions.question import Question
from rpt_jax.registry import VERIFIERS
from rpt_jax.rewards.responses import Response, last_box
from rpt_jax.rewards.verifier_pool import CRASHED, DONE, TIMED_OUT, Verdict, VerifierPool
from rpt_jax.rewards.verifiers import why_unreadable
from rpt_jax.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rpt_jax.rollout.rollouts import Rollouts

REJECTED_QUESTIONS = "rejected_questions.jsonl"


class AnswerStatus(enum.IntEnum):
    """Outcome of a response to a question. What `rewards.prefix_match.Status` has too has the same number."""

    CORRECT = 0
    """The verifier accepts the answer."""
    WRONG = 1
    """The verifier does not accept the answer, or only in part."""
    UNVERIFIED = 2
    """The verification took too long, or the verifier failed. The response counts as wrong."""
    EMPTY = 3
    """The box is empty."""
    NO_BOX = 4
    """Thinking does not end or, for a verifier that reads a box, there is none after it."""
    NOT_FINISHED = 5
    """The response was cut by the length limit. This takes precedence over the other outcomes."""


class VerifiedBatch(NamedTuple):
    """What the verifiers found out about G responses to each of P questions, the same on every process.

    Attributes:
      score_PxG: float32, 1 for a correct answer.
      status_PxG: int32, `AnswerStatus`.
      timed_out: number of responses whose verification took too long.
      crashed: number of responses whose verifier failed.
      seconds: seconds of the verifiers, over all worker processes.
      waited: seconds that this process waited for them.
    """

    score_PxG: np.ndarray
    status_PxG: np.ndarray
    timed_out: int
    crashed: int
    seconds: float
    waited: float


def measured_with(experiment: Experiment, params: Params, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what pass rates are measured with, as `questions.difficulty.PassRates` has it.

    Args:
      experiment: the config.
      params: of the policy.
      tokenizer: of the policy.
    """
    sampling = sampling_fields(experiment)
    # The text of a template file may change.
    template = read_template(experiment.prompt.template, experiment.prompt_slot)
    return {
        "policy": fingerprint_arrays(params),
        "tokenizer": tokenizer.fingerprint,
        "verifier": experiment.questions.verifier,
        "sampling": {**sampling, "prompt.template": experiment.prompt_slot.join(template)},
    }


def load_verifiable_questions(
    experiment: Experiment, params: Params, tokenizer: Tokenizer, workdir: Path
) -> QuestionSets:
    """Load the questions whose answers the verifier accepts, those to train on of the right difficulty.

    Args:
      experiment: the config.
      params: of the starting policy, which pass rates should be of.
      tokenizer: of the policy.
      workdir: rejected questions are listed in its `rejected_questions.jsonl`.

    Raises: UserError, as `questions.loading.load_questions` and `DifficultyFilter` do.
    """
    config = experiment.questions
    readable = functools.partial(why_unreadable, config.verifier)
    listing = workdir / REJECTED_QUESTIONS if is_leader() else None
    if not config.pass_rates:
        return load_questions(config, readable, listing=listing)
    choose = DifficultyFilter(config, measured_with(experiment, params, tokenizer))
    return load_questions(config, readable, choose, listing)


class PendingBatch:
    """Responses that are being verified."""

    def __init__(self, status_RxG: np.ndarray, verdicts: Sequence[Future[Verdict]], count: int):
        """
        Args:
          status_RxG: int32, the status of the responses to the R questions of this process; `WRONG` where a verifier decides.
          verdicts: of those, in order, from `VerifierPool.submit`.
          count: P, questions of all processes.
        """
        self._status_RxG = status_RxG
        self._count = count
        self._verdicts = verdicts

    def result(self) -> VerifiedBatch:
        """Wait for the verifiers and return the batch. A collective: every process must call it."""
        start = time.monotonic()
        verdicts = [verdict.result() for verdict in self._verdicts]
        # Equal answers to a question are verified once, and have the same verdict.
        seconds = sum(verdict.result().seconds for verdict in set(self._verdicts))
        waited = time.monotonic() - start
        score_RxG = np.zeros(self._status_RxG.shape, np.float32)
        status_RxG = self._status_RxG.copy()
        read_RxG = status_RxG == AnswerStatus.WRONG
        score_RxG[read_RxG] = [verdict.score for verdict in verdicts]
        status_RxG[read_RxG] = [_status(verdict) for verdict in verdicts]
        counts = [sum(verdict.outcome == outcome for verdict in verdicts) for outcome in (TIMED_OUT, CRASHED)]
        totals = gather_rows(np.array([[*counts, seconds]], np.float32)).sum(axis=0)
        return VerifiedBatch(
            score_PxG=gather_rows(score_RxG)[: self._count],
            status_PxG=gather_rows(status_RxG)[: self._count],
            timed_out=int(totals[0]),
            crashed=int(totals[1]),
            seconds=float(totals[2]),
            waited=waited,
        )


def _status(verdict: Verdict) -> AnswerStatus:
    if verdict.outcome != DONE:
        return AnswerStatus.UNVERIFIED
    return AnswerStatus.CORRECT if verdict.score >= 1.0 else AnswerStatus.WRONG


class BatchVerifier:
    """Verifies batches of responses. Every process of a run verifies an equal part of each batch."""

    def __init__(self, config: QuestionsConfig, tokenizer: Tokenizer):
        """
        Args:
          config: section `questions`, which names the verifier and limits its time.
          tokenizer: gives the bytes of tokens.
        """
        self._tokenizer = tokenizer
        self._reads_box = VERIFIERS[config.verifier].requirements.box
        self._pool = VerifierPool(config.verifier, config.verifier_workers, config.verifier_seconds)

    def submit(self, questions: Sequence[Question], rollouts: Rollouts) -> PendingBatch:
        """Start to verify responses, and return at once. A collective: every process must call it.

        Args:
          questions: the P questions.
          rollouts: G responses to each of them.
        """
        tokens_PxGxT, lengths_PxG, ended_PxG = to_host(
            (rollouts.tokens_PxGxT, rollouts.lengths_PxG, rollouts.ended_PxG)
        )
        stopped_PxG = rollouts._replace(ended_PxG=ended_PxG).stopped_PxG
        # Every process has as many rows, of which the last ones may be empty.
        part = -(-len(questions) // jax.process_count())
        first = jax.process_index() * part
        status_RxG = np.full((part, lengths_PxG.shape[1]), AnswerStatus.NOT_FINISHED, np.int32)
        answers = []
        for r, p in enumerate(range(first, min(first + part, len(questions)))):
            for g, length in enumerate(lengths_PxG[p]):
                response = Response.of_tokens(
                    tokens_PxGxT[p, g, :length].tolist(),
                    self._tokenizer.pieces,
                    self._tokenizer.end_think_id,
                    finished=bool(stopped_PxG[p, g]),
                )
                answer = self._read(response)
                if isinstance(answer, AnswerStatus):
                    status_RxG[r, g] = answer
                else:
                    status_RxG[r, g] = AnswerStatus.WRONG
                    answers.append((answer, questions[p]))
        return PendingBatch(status_RxG, self._pool.submit(answers), len(questions))

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _read(self, response: Response) -> str | AnswerStatus:
        """Return what the verifier reads of a response, or why there is nothing to read."""
        if not response.finished:
            return AnswerStatus.NOT_FINISHED
        answer = response.answer
        if answer is not None and self._reads_box:
            answer = last_box(answer)
        if answer is None:
            return AnswerStatus.NO_BOX
        if not answer.strip():
            return AnswerStatus.EMPTY
        return answer.decode(errors="replace")
