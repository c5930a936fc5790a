"""The prefix-matching reward: does the boxed prediction match the true continuation (paper, Equation 3)?"""

from __future__ import annotations

import enum
import functools

import jax
import jax.numpy as jnp

from rpt_jax.rewards.boxed import NO_PREDICTION, BoxParser, parse_responses


class Status(enum.IntEnum):
    """Outcome of a rollout under Equation 3."""

    CORRECT = 0
    """The prediction is one or more whole tokens of the true continuation. The only status with reward 1."""
    WRONG_BYTES = 1
    """The prediction differs from the continuation, or is longer than the stored part of it."""
    INSIDE_TOKEN = 2
    """The prediction is a prefix of the continuation, but ends inside one of its tokens."""
    EMPTY = 3
    """The box is empty."""
    NO_BOX = 4
    """There is no end-of-thinking marker, no box after it, or no closing brace where the reading needs one."""
    NOT_FINISHED = 5
    """The response was cut by the length limit. This takes precedence over the other outcomes."""


@functools.partial(jax.jit, static_argnames="reading")
@jax.named_scope("reward")
def prefix_match_reward(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    stopped_PxG: jax.Array,
    reference_PxR: jax.Array,
    boundaries_PxRp1: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_think_id: int | jax.Array,
    *,
    reading: str = "balanced",
) -> tuple[jax.Array, jax.Array]:
    """Return the reward and the `Status` of every rollout (paper, Equation 3).

    The reward is 1 if the predicted bytes equal the first bytes of the true continuation and end at one of its token
    boundaries, else 0. Only the continuation up to its last stored boundary counts: a longer prediction is
    `WRONG_BYTES`. How the prediction is read from a response is described in `rewards.boxed`.

    Args:
      tokens_PxGxT: int32 response tokens; those at and after a response's length are ignored.
      lengths_PxG: int32 response lengths including the stop token, 0 to T.
      stopped_PxG: bool, False for a response that was cut by the length limit.
      reference_PxR: uint8 bytes of the true continuation; those after the last boundary are padding.
      boundaries_PxRp1: bool, True at the cumulative token ends of the continuation, False at 0.
      vocab_bytes_VxX: uint8 raw bytes of every token; those after its length are padding.
      vocab_lengths_V: int32 number of bytes of every token, 0 for special tokens. An id outside the table has no bytes.
      end_think_id: id of the end-of-thinking token, or -1 if the tokenizer has none.
      reading: static; "balanced" or "to_end".

    Returns:
      reward_PxG (float32, 0 or 1) and status_PxG (int32).
    """
    state_PxG = parse_responses(
        tokens_PxGxT,
        lengths_PxG,
        stopped_PxG,
        reference_PxR,
        vocab_bytes_VxX,
        vocab_lengths_V,
        end_think_id,
        reading=reading,
    )
    status_PxG = match_status(state_PxG, stopped_PxG, boundaries_PxRp1)
    return (status_PxG == Status.CORRECT).astype(jnp.float32), status_PxG


def match_status(state_PxG: BoxParser, stopped_PxG: jax.Array, boundaries_PxRp1: jax.Array) -> jax.Array:
    """Return the `Status` of every rollout, int32 [P, G], from its final parser state."""
    return jax.vmap(jax.vmap(_status, in_axes=(0, 0, None)))(state_PxG, stopped_PxG, boundaries_PxRp1)


def _status(state: BoxParser, stopped: jax.Array, boundaries_Rp1: jax.Array) -> jax.Array:
    """Return the status of one rollout from its final parser state."""
    size = state.prediction_size
    stored = jnp.max(jnp.where(boundaries_Rp1, jnp.arange(boundaries_Rp1.shape[0]), 0))
    prefix = state.prediction_equal & (size <= stored)
    return jnp.select(
        [~stopped, size == NO_PREDICTION, size == 0, prefix & boundaries_Rp1[size], prefix],
        [Status.NOT_FINISHED, Status.NO_BOX, Status.EMPTY, Status.CORRECT, Status.INSIDE_TOKEN],
        Status.WRONG_BYTES,
    ).astype(jnp.int32)
