"""Dynamic sampling: groups without variance are replaced by groups of fresh prompts (DAPO, 2503.14476)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rpt_jax.distributed.sharding import constrain_batch
from rpt_jax.objective.advantage import has_variance
from rpt_jax.rewards.rewarder import RewardedRollouts


@jax.jit
@jax.named_scope("dynamic_sampling")
def prefer_variance(kept: RewardedRollouts, fresh: RewardedRollouts) -> RewardedRollouts:
    """Return P of the groups of two batches of P: those with variance first, and `kept` before `fresh`."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, fresh)
    order = jnp.argsort(~has_variance(both.reward_PxG), stable=True)[: kept.reward_PxG.shape[0]]
    return constrain_batch(jax.tree.map(lambda x: x[order], both))


@functools.partial(jax.jit, static_argnames="count")
def first_prompts(batch: RewardedRollouts, count: int) -> RewardedRollouts:
    """Return the first `count` prompts with their rollouts, to fetch only these from the devices."""
    return jax.tree.map(lambda x: x[:count], batch)
