"""The batch that an update learns from, and the sizes of an update."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.config import ObjectiveConfig
from rpt_jax.distributed.sharding import constrain_batch
from rpt_jax.objective.advantage import group_advantages, has_variance


class NextTokenBatch(NamedTuple):
    """Text for next-token cross-entropy.

    Attributes:
      inputs_NxS: int32 ids.
      targets_NxS: int32 ids that follow the inputs.
      mask_NxS: bool, True for targets that count.
    """

    inputs_NxS: jax.Array
    targets_NxS: jax.Array
    mask_NxS: jax.Array


class UpdateBatch(NamedTuple):
    """P groups of G responses.

    Attributes:
      prompts_PxS: int32 prompt ids, padded on the right.
      lengths_P: int32 prompt lengths.
      window_P: int32 number of the document window that a prompt is from. Prompts of one window may share a prefix.
      tokens_PxGxT: int32 response ids.
      mask_PxGxT: bool, True for response tokens up to and including the stop token.
      sampler_logprobs_PxGxT: float32 log-probabilities that the sampler computed.
      advantages_PxG: float32.
      counted_P: bool, False for groups without variance that dynamic sampling could not replace.
      documents: text of the P prompts' documents, if their cross-entropy is part of the loss.
    """

    prompts_PxS: jax.Array
    lengths_P: jax.Array
    window_P: jax.Array
    tokens_PxGxT: jax.Array
    mask_PxGxT: jax.Array
    sampler_logprobs_PxGxT: jax.Array
    advantages_PxG: jax.Array
    counted_P: jax.Array
    documents: NextTokenBatch | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateLimits:
    """Sizes of an update, and the sampling parameters that it shares with the rollouts. Hashable.

    Attributes:
      minibatches: optimizer steps per batch; each uses an equal part of the groups.
      rows: packed rows per forward pass, at least one per device. Does not change the result.
      microbatch_tokens: tokens per row. Does not change the result.
      logit_chunk_tokens: tokens per device whose logits exist at once. Does not change the result.
      temperature: sampling temperature of the rollouts.
      max_new_tokens: length limit of responses.
    """

    minibatches: int
    rows: int
    microbatch_tokens: int
    logit_chunk_tokens: int
    temperature: float
    max_new_tokens: int


@functools.partial(jax.jit, static_argnames=("objective", "only_informative"))
def to_update_batch(
    objective: ObjectiveConfig,
    *,
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    window_P: jax.Array,
    tokens_PxGxT: jax.Array,
    response_lengths_PxG: jax.Array,
    sampler_logprobs_PxGxT: jax.Array,
    reward_PxG: jax.Array,
    only_informative: bool,
    documents: NextTokenBatch | None = None,
) -> UpdateBatch:
    """Compute the group-relative advantages of rollouts and return the batch to learn from.

    Args:
      objective: section "objective" of the config.
      prompts_PxS, lengths_P, window_P, tokens_PxGxT, sampler_logprobs_PxGxT, documents: see `UpdateBatch`.
      response_lengths_PxG: int32 response lengths, the stop token included.
      reward_PxG: float32.
      only_informative: whether groups without variance are excluded from the batch, as with dynamic sampling.
    """
    varied_P = has_variance(reward_PxG)
    counted_P = varied_P if only_informative else jnp.ones_like(varied_P)
    advantages_PxG = group_advantages(
        objective.advantage, reward_PxG, response_lengths_PxG, counted_P, objective.advantage_epsilon
    )
    batch = UpdateBatch(
        prompts_PxS=prompts_PxS,
        lengths_P=lengths_P,
        window_P=window_P,
        tokens_PxGxT=tokens_PxGxT,
        mask_PxGxT=jnp.arange(tokens_PxGxT.shape[-1]) < response_lengths_PxG[..., None],
        sampler_logprobs_PxGxT=sampler_logprobs_PxGxT,
        advantages_PxG=advantages_PxG,
        counted_P=counted_P,
        documents=documents,
    )
    return constrain_batch(batch)
