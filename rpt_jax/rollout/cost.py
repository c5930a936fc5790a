"""What sampling took: the utilization of decode slots, and FLOPs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.flops import cache_flops, causal_pairs, forward_flops
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.rollout.prefix_sharing import Prompts
from rpt_jax.rollout.rollouts import DecodeWork, Rollouts


class SamplingCost(NamedTuple):
    """What sampling took on all replicas together, scalars.

    Attributes:
      decoded_tokens: int32, tokens that decode steps produced.
      slot_steps: int32, tokens that they could have produced with every slot in use.
      flops: float32, model FLOPs.
    """

    decoded_tokens: jax.Array
    slot_steps: jax.Array
    flops: jax.Array

    @property
    def occupancy(self) -> jax.Array:
        """The fraction of slots in use, float32."""
        return self.decoded_tokens / jnp.maximum(self.slot_steps, 1)

    def plus(self, other: SamplingCost) -> SamplingCost:
        """Return the cost of both."""
        return _add(self, other)


@functools.partial(jax.jit, static_argnames="config")
def sampling_cost(config: ModelConfig, prompts: Prompts, rollouts: Rollouts, work: DecodeWork) -> SamplingCost:
    """Return the cost of a batch of rollouts.

    A shared prefix runs once. Only the last token of a prompt reaches the head, once for all samples, and the last token
    of a response is never run.

    Args:
      config: of the policy.
      prompts: the prompts with their shared prefixes.
      rollouts: the sampled responses.
      work: what decoding took.
    """
    roots_N = jnp.asarray(prompts.lengths_N, jnp.float32)
    tails_P = jnp.asarray(prompts.tail_lengths_P, jnp.float32)
    ends_P = jnp.asarray(prompts.ends_P, jnp.float32)
    # The first token of each response comes from the prefill.
    decoded_PxG = jnp.maximum(rollouts.lengths_PxG - 1, 0)
    decoded = decoded_PxG.sum()
    pairs_PxG = causal_pairs(decoded_PxG.astype(jnp.float32), (ends_P + tails_P)[:, None])
    flops = (
        cache_flops(config, tokens=roots_N.sum(), pairs=causal_pairs(roots_N).sum()),
        forward_flops(
            config, tokens=tails_P.sum(), pairs=causal_pairs(tails_P, ends_P).sum(), head_tokens=len(tails_P)
        ),
        forward_flops(config, tokens=decoded, pairs=pairs_PxG.sum(), head_tokens=decoded),
    )
    return SamplingCost(decoded_tokens=decoded, slot_steps=work.slots.sum(), flops=jnp.stack(flops).sum())


@jax.jit
def _add(a: SamplingCost, b: SamplingCost) -> SamplingCost:
    return jax.tree.map(jnp.add, a, b)
