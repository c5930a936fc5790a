"""FLOPs of rewards that run the policy again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rpt_jax.config import ObjectiveConfig
from rpt_jax.model.flops import causal_pairs, forward_flops
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.registry import REWARDS


@functools.partial(jax.jit, static_argnames=("config", "objective"))
def reward_flops(
    config: ModelConfig, objective: ObjectiveConfig, lengths_P: jax.Array, lengths_PxG: jax.Array
) -> jax.Array:
    """Return the FLOPs of the forward passes of a training reward, float32; 0 for one that does not run the policy.

    The few tokens of the reference that are scored, and their logits, are not counted.

    Args:
      config: of the policy.
      objective: names the reward.
      lengths_P: int32 prompt lengths.
      lengths_PxG: int32 response lengths.
    """
    requirements = REWARDS[objective.reward].requirements
    prompts_P = jnp.asarray(lengths_P, jnp.float32)
    responses_PxG = lengths_PxG.astype(jnp.float32)
    prompts = forward_flops(config, tokens=prompts_P.sum(), pairs=causal_pairs(prompts_P).sum(), head_tokens=0)
    pairs = causal_pairs(responses_PxG, prompts_P[:, None]).sum()
    responses = forward_flops(config, tokens=responses_PxG.sum(), pairs=pairs, head_tokens=0)
    # The registry counts sampling as a pass too.
    return (requirements.prompt_passes - 1) * prompts + (requirements.response_passes - 1) * responses
