"""Rollouts: sample responses to prompts, on every data-parallel replica its own share.

What prompts have in common is prefilled once (prefill.py), then all samples are decoded in one program (engine.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from rpt_jax.distributed.mesh import DECODING, in_one_replica, prompt_axes
from rpt_jax.distributed.sharding import constrain_batch
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.rollout.engine import Decoding, Ended, Rollouts, Work, decode_all
from rpt_jax.rollout.prefix_sharing import Prompts, share_prefixes

__all__ = ["Decoding", "Ended", "Prompts", "Rollouts", "Work", "generate", "sample_rollouts"]


def generate(
    policy: Transformer,
    params: Params,
    prompts_PxS: np.ndarray | jax.Array,
    lengths_P: np.ndarray | jax.Array,
    prompt_ids_P: np.ndarray | jax.Array,
    key: jax.Array,
    **decoding: Any,
) -> Rollouts:
    """Sample responses to prompts of token ids, [P, G]: `sample_rollouts`, which finds out what they have in common.

    What that is decides on the shapes that are compiled for. To compile once whatever comes, call `sample_rollouts` itself.

    Args:
      policy, params: the decoder and its parameters.
      prompts_PxS: int32 ids, padded on the right with anything.
      lengths_P: int32 prompt lengths, at least 1.
      prompt_ids_P: int32, tells prompts apart for the noise.
      key: fold_in(run's key, step).
      decoding: the fields of `Decoding`.
    """
    host = (np.asarray(x) for x in (prompts_PxS, lengths_P, prompt_ids_P))
    prompts = share_prefixes(*host, parts=replica_count())
    return sample_rollouts(policy, params, prompts, key, Decoding(**decoding))[0]


@functools.partial(jax.jit, static_argnames=("policy", "decoding"))
def sample_rollouts(
    policy: Transformer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    decoding: Decoding,
    vocab: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[Rollouts, Work]:
    """Sample G responses to each of the P prompts.

    The noise of a token is a function of (key, prompt id, sample, position in the response): the same rollouts come out for
    any order of the prompts, any batch they are part of, any number of slots and devices, and whatever is prefilled together.

    On a mesh, the devices that share a policy while it samples (mesh.rollout_tensor) are a replica: it has its own part of the
    prompts, of their roots and of the slots, and its loop ends with its own last rollout.

    Args:
      vocab: bytes [V, X] and lengths [V] of the tokens, where responses are to end at their box; else None.

    Returns: the rollouts, and what decoding them took.
    """
    axes = prompt_axes(DECODING)
    decoding = decoding._replace(slots=-(-decoding.slots // replica_count()))

    def of_one_replica(params: Params, prompts: Prompts, *others: Any) -> tuple[Rollouts, Work]:
        with in_one_replica():
            return decode_all(policy, params, prompts, *others, decoding)

    if not axes:
        return of_one_replica(params, prompts, key, vocab)
    everywhere, split = PartitionSpec(), PartitionSpec(axes)
    rollouts, work = jax.shard_map(
        of_one_replica,
        in_specs=(everywhere, split, everywhere, everywhere),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )(params, prompts, key, vocab)
    return constrain_batch(rollouts), work


def replica_count() -> int:
    """Replicas of the mesh in context."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in prompt_axes(DECODING))
