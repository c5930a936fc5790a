"""Arrays and settings of sampling: rollouts, why they ended, what decoding them took."""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ended(enum.IntEnum):
    """Why a response ended."""

    LENGTH = 0
    """It reached the length limit."""
    STOP = 1
    """It ended with one of the stop tokens."""
    BOX = 2
    """It ended with the brace that closes the box of its answer."""


class Rollouts(NamedTuple):
    """G sampled responses to each of P prompts.

    Attributes:
      tokens_PxGxT: int32 ids; zeros after the response's length.
      lengths_PxG: int32 number of response tokens, the last one included.
      logprobs_PxGxT: float32 log-probability of each token under the distribution that it was drawn from; zeros after
        the length.
      ended_PxG: int32, one of `Ended`.
    """

    tokens_PxGxT: jax.Array
    lengths_PxG: jax.Array
    logprobs_PxGxT: jax.Array
    ended_PxG: jax.Array

    @property
    def mask_PxGxT(self) -> jax.Array:
        """True for response tokens, up to and including the last one."""
        return jnp.arange(self.tokens_PxGxT.shape[-1]) < self.lengths_PxG[..., None]

    @property
    def stopped_PxG(self) -> jax.Array:
        """False for responses that were cut by the length limit."""
        return self.ended_PxG != Ended.LENGTH


class DecodeWork(NamedTuple):
    """What decoding took on each replica. A slot is in use until the check that finds that its rollout has ended.

    Attributes:
      steps: int32 [replicas, sizes], decode steps at each of the sizes that the batch of live rollouts shrinks through.
      slots: int32 [replicas], the sum over steps of the batch size.
    """

    steps: jax.Array
    slots: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Sampling parameters. Hashable.

    `slots` and `prefill_tokens` bound memory, and `steps_per_check` is for speed; none of them changes the result.

    Attributes:
      samples: G, responses per prompt.
      max_new_tokens: T, length limit of responses.
      temperature: sampling temperature, above 0.
      stop_ids: tokens that end a response. If empty, every response has length T.
      top_k: number of most likely tokens to sample from; 0 for all.
      top_p: probability mass of the most likely tokens to sample from; 1 for all.
      end_think_id: id of the end-of-thinking token, or -1. Used to end responses at their box.
      answers: whether prompts end with the end-of-thinking marker, so that a response is an answer from its first token.
      slots: rollouts that are decoded at once, over all replicas; 0 for all.
      prefill_tokens: tokens that are prefilled at once.
      steps_per_check: decode steps between two checks which rollouts have ended; 0 for the platform's number.
    """

    samples: int
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    end_think_id: int = -1
    answers: bool = False
    slots: int = 0
    prefill_tokens: int = 4096
    steps_per_check: int = 0
