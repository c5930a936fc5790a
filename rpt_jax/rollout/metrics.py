"""Metrics of a batch of rollouts."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.objective.advantage import has_variance
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.cost import SamplingCost
from rpt_jax.rollout.rollouts import Ended


@jax.jit
@jax.named_scope("rollout_metrics")
def rollout_metrics(batch: RewardedRollouts, cost: SamplingCost) -> dict[str, jax.Array]:
    """Return scalars that describe the rollouts that the update learns from, by their names in metrics.jsonl."""
    rollouts = batch.rollouts
    lengths_PxG = rollouts.lengths_PxG
    metrics = {f"ended/{ended.name.lower()}": (rollouts.ended_PxG == ended).mean() for ended in Ended}
    metrics |= {f"distinct/{n}": distinct_fraction(rollouts.tokens_PxGxT, lengths_PxG, n) for n in (1, 2, 3)}
    return metrics | {
        "reward/mean": batch.reward_PxG.mean(),
        "reward/deviation": batch.reward_PxG.std(axis=1).mean(),
        "groups/zero_variance": 1.0 - has_variance(batch.reward_PxG).mean(),
        "length/mean": lengths_PxG.mean(),
        "length/p90": jnp.percentile(lengths_PxG, 90),
        "length/max": lengths_PxG.max(),
        "rollout/occupancy": cost.occupancy,
        # The mean negative log-probability of sampled tokens estimates the policy's entropy (nats, at the sampling
        # temperature).
        "policy/entropy": -jnp.sum(rollouts.logprobs_PxGxT) / jnp.maximum(rollouts.mask_PxGxT.sum(), 1),
    }


@functools.partial(jax.jit, static_argnames="statuses")
def status_metrics(status_PxG: jax.Array, statuses: type[enum.IntEnum]) -> dict[str, jax.Array]:
    """Return the fraction of rollouts with each status, and of those with a box, by their names in metrics.jsonl.

    Args:
      status_PxG: int32, the status of each rollout.
      statuses: static; all statuses, with those of `rewards.prefix_match.Status` for responses without a box.
    """
    has_no_box_PxG = jnp.isin(status_PxG, jnp.array([Status.NO_BOX, Status.NOT_FINISHED]))
    metrics = {f"status/{status.name.lower()}": (status_PxG == status).mean() for status in statuses}
    return metrics | {"format/rate": 1.0 - has_no_box_PxG.mean()}


@jax.jit
def drawn_metrics(reward_PxG: jax.Array) -> dict[str, jax.Array]:
    """Return scalars of the groups of one round, before dynamic sampling selects among them, by their names in metrics.jsonl."""
    return {
        "reward/drawn_mean": reward_PxG.mean(),
        "groups/drawn_zero_variance": 1.0 - has_variance(reward_PxG).mean(),
    }


def mean_over_rounds(rounds: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the means of `drawn_metrics` over the rounds of a step, which have equally many groups."""
    return {name: float(np.mean([metrics[name] for metrics in rounds])) for name in rounds[0]}


def distinct_fraction(tokens_PxGxT: jax.Array, lengths_PxG: jax.Array, n: int) -> jax.Array:
    """Return distinct-n, the fraction of distinct n-grams in a prompt's samples, averaged over prompts (1510.03055).

    N-grams are compared by a 32-bit hash. Prompts whose samples are all shorter than n are excluded.
    """
    starts = tokens_PxGxT.shape[2] - n + 1
    if starts < 1:
        return jnp.float32(1.0)
    hashed = jnp.zeros((*tokens_PxGxT.shape[:2], starts), jnp.uint32)
    for i in range(n):
        hashed = (hashed ^ tokens_PxGxT[..., i : i + starts].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hashed ^= hashed >> 15
    # Sorted per prompt, equal n-grams are neighbors. The largest hash marks positions without an n-gram.
    real = jnp.arange(starts) <= lengths_PxG[..., None] - n
    none = jnp.uint32(2**32 - 1)
    hashed = jnp.where(real, jnp.minimum(hashed, none - 1), none)
    sorted_PxM = jnp.sort(hashed.reshape(len(tokens_PxGxT), -1), axis=1)
    first_PxM = (jnp.diff(sorted_PxM, axis=1, prepend=none) != 0) & (sorted_PxM != none)
    total_P = real.sum(axis=(1, 2))
    fraction_P = first_PxM.sum(axis=1) / jnp.maximum(total_P, 1)
    return jnp.sum(jnp.where(total_P > 0, fraction_P, 0.0)) / jnp.maximum((total_P > 0).sum(), 1)
