"""The reward of responses to questions: whether a verifier accepts the answer.

The verifiers run in worker processes on the host while the devices go on: `submit` returns at once, and `result` waits.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rpt_jax.distributed.processes import gather_rows, to_host
from rpt_jax.questions.question import Question
from rpt_jax.registry import VERIFIERS
from rpt_jax.rewards.responses import Response, last_box
from rpt_jax.rewards.verifier_pool import VerifierPool
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.tokenizers.tokenizer import Tokenizer


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
