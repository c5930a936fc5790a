"""How much of a segment a prediction gets right, in whole tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rpt_jax.rewards.boxed import parse_responses
from rpt_jax.rewards.prefix_match import match_status


@functools.partial(jax.jit, static_argnames="reading")
@jax.named_scope("segment_match")
def segment_match(
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
    """Return the share of each target's tokens that the prediction begins with, and the `Status`, of every rollout.

    The tokens that count are those up to the longest common prefix of the predicted and the true bytes, as far as they are whole.
    What the prediction holds after them does not count. Without a prediction, or without a target, the share is 0. The arguments
    and the status are those of `rewards.prefix_match.prefix_match_reward`.

    Returns:
      share_PxG (float32, 0 to 1) and status_PxG (int32).
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
        track_equal_size=True,
    )
    assert state_PxG.equal_size is not None
    # Bytes after the closing brace of the box are not part of the prediction.
    equal_PxG = jnp.minimum(state_PxG.equal_size, state_PxG.prediction_size)
    tokens_PxRp1 = jnp.cumsum(boundaries_PxRp1, axis=1)
    size = tokens_PxRp1.shape[1] - 1
    whole_PxG = jnp.take_along_axis(tokens_PxRp1, jnp.clip(equal_PxG, 0, size), axis=1)
    share_PxG = whole_PxG / jnp.maximum(tokens_PxRp1[:, -1:], 1)
    share_PxG = jnp.where(stopped_PxG & (equal_PxG > 0), share_PxG, 0.0).astype(jnp.float32)
    return share_PxG, match_status(state_PxG, stopped_PxG, boundaries_PxRp1)
