"""Sampling of responses, on every data-parallel replica its own part of the prompts."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from rpt_jax.distributed.mesh import DECODING, in_one_replica, prompt_axes
from rpt_jax.distributed.sharding import constrain_batch
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.rollout.engine import decode_rollouts
from rpt_jax.rollout.prefix_sharing import Prompts, share_prefixes
from rpt_jax.rollout.rollouts import DecodeWork, Decoding, Rollouts
from rpt_jax.tokenizers.tokenizer import ByteVocab


def generate(
    policy: Transformer,
    params: Params,
    prompts_PxS: np.ndarray | jax.Array,
    lengths_P: np.ndarray | jax.Array,
    prompt_ids_P: np.ndarray | jax.Array,
    key: jax.Array,
    **decoding: Any,
) -> Rollouts:
    """Sample responses to prompts of token ids, [P, G]. Prompts with a common prefix share its prefill.

    The shapes to compile for depend on the prefixes that are found. Call `sample_rollouts` directly to control this.

    Args:
      policy: the decoder.
      params: its parameters.
      prompts_PxS: int32 ids, padded on the right with any ids.
      lengths_P: int32 prompt lengths, at least 1.
      prompt_ids_P: int32 prompt ids, which determine the sampling noise.
      key: the step's random key, fold_in(run's key, step).
      decoding: fields of `Decoding`.
    """
    prompts = share_prefixes(
        np.asarray(prompts_PxS), np.asarray(lengths_P), np.asarray(prompt_ids_P), parts=replica_count()
    )
    rollouts, _ = sample_rollouts(policy, params, prompts, key, Decoding(**decoding))
    return rollouts


@functools.partial(jax.jit, static_argnames=("policy", "decoding"))
@in_policy_precision
def sample_rollouts(
    policy: Transformer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    decoding: Decoding,
    vocab: ByteVocab | None = None,
) -> tuple[Rollouts, DecodeWork]:
    """Sample G responses to each of the P prompts.

    The noise of a token is a function of (key, prompt id, sample, position in the response). The rollouts are the same
    in any batch, for any order of the prompts, any number of slots and devices, and any sharing of prefixes.

    On a mesh, the devices that share a policy during sampling (mesh.rollout_tensor) form a replica. Each replica has
    its own part of the prompts, the roots and the slots, and its decode loop ends with its own last rollout.

    Args:
      policy: the decoder.
      params: its parameters.
      prompts: prompts and their shared prefixes, with `replica_count()` parts.
      key: the step's random key.
      decoding: sampling parameters.
      vocab: raw bytes of every token, to end responses at their box; None to continue them.

    Returns: the rollouts, and the work that decoding took.
    """
    # The slots are divided among the replicas.
    axes = prompt_axes(DECODING)
    replica_decoding = dataclasses.replace(decoding, slots=-(-decoding.slots // replica_count()))

    def on_replica(
        params: Params, prompts: Prompts, key: jax.Array, vocab: ByteVocab | None
    ) -> tuple[Rollouts, DecodeWork]:
        with in_one_replica():
            return decode_rollouts(policy, params, prompts, key, vocab, replica_decoding)

    if not axes:
        return on_replica(params, prompts, key, vocab)

    # Under shard_map each replica runs its own loop: nothing makes it wait for the others.
    replicated = PartitionSpec()
    split = PartitionSpec(axes)
    rollouts, work = jax.shard_map(
        on_replica,
        in_specs=(replicated, split, replicated, replicated),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )(params, prompts, key, vocab)
    return constrain_batch(rollouts), work


def replica_count() -> int:
    """Return the number of replicas of the mesh in context."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in prompt_axes(DECODING))
