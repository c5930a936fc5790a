"""Splitting of a batch into minibatches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rpt_jax.objective.batch import UpdateBatch


def split_minibatches(batch: UpdateBatch, minibatches: int) -> UpdateBatch:
    """Split P groups into minibatches of P / `minibatches` groups, with the counted groups spread evenly over them.

    Dynamic sampling puts the groups that do not count last. Without spreading, the last minibatches would have nothing
    to learn from. The order of the counted groups, neighbors of which may share a prefix, is kept.

    Returns: the batch with the leading axes [minibatches, P / minibatches].
    """
    order_P = _spread(batch.counted_P, minibatches)
    return jax.tree.map(lambda x: x[order_P].reshape(minibatches, -1, *x.shape[1:]), batch)


def _spread(counted_P: jax.Array, minibatches: int) -> jax.Array:
    """Return the order of the groups: every minibatch gets the same number of counted ones, give or take one."""
    size = len(counted_P) // minibatches
    rank_P = jnp.cumsum(counted_P) - 1
    target_P = rank_P * minibatches // jnp.maximum(counted_P.sum(), 1)
    # The other groups fill what the counted ones leave of each minibatch.
    counts_M = jnp.sum(counted_P & (target_P == jnp.arange(minibatches)[:, None]), axis=1)
    other_rank_P = jnp.cumsum(~counted_P) - 1
    other_target_P = jnp.searchsorted(jnp.cumsum(size - counts_M), other_rank_P, side="right")
    return jnp.argsort(jnp.where(counted_P, target_P, other_target_P), stable=True)
