"""Rollouts: sample responses to prompts, on every data-parallel replica its own share.

What prompts have in common is prefilled once (prefill.py), then all samples are decoded in one program (engine.py).
"""

from __future__ import annotations

import functools
import math

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

from rpt_jax.policy.transformer import Params, Transformer
from rpt_jax.rollout.engine import Decoding, Rollouts, decode_all
from rpt_jax.rollout.prefill import Prompts, separate

__all__ = ["Decoding", "Prompts", "Rollouts", "generate", "sample_rollouts"]


def generate(
    policy: Transformer,
    params: Params,
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    prompt_ids_P: jax.Array,
    key: jax.Array,
    **decoding: object,
) -> Rollouts:
    """Sample responses to prompts that are given one by one: `sample_rollouts` for token ids.

    Args:
      policy, params: the decoder and its parameters.
      prompts_PxS: int32 ids, padded on the right with anything.
      lengths_P: int32 prompt lengths, at least 1.
      prompt_ids_P: int32, tells prompts apart for the noise.
      key: fold_in(run's key, step).
      decoding: the fields of `Decoding`.
    """
    prompts = separate(prompts_PxS, lengths_P, prompt_ids_P)
    return sample_rollouts(policy, params, prompts, key, Decoding(**decoding))[0]


@functools.partial(jax.jit, static_argnames=("policy", "decoding"))
def sample_rollouts(
    policy: Transformer, params: Params, prompts: Prompts, key: jax.Array, decoding: Decoding
) -> tuple[Rollouts, jax.Array]:
    """Sample G responses to each of the P = N·J prompts.

    The noise of a token is a function of (key, prompt id, sample, position in the response): the same rollouts come out for
    any order of the prompts, any batch they are part of, any number of slots and devices, and whatever is prefilled together.

    On a mesh, the devices that share prompts (axis "tensor") are a replica: it has its own part of the N roots and of the
    slots, and its loop ends with its own last rollout.

    Returns: the rollouts (empty where there is no prompt), and int32 [replicas, sizes]: decode steps in each of `live_sizes`.
    """
    decode = functools.partial(decode_all, policy)
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else nn.logical_to_mesh_axes(("prompt",))[0]
    axes = tuple(axis for axis in axes or () if mesh.shape[axis] > 1)
    replicas = math.prod(mesh.shape[axis] for axis in axes)
    if not axes:
        return decode(params, prompts, key, decoding)
    decoding = decoding._replace(slots=-(-decoding.slots // replicas))

    def of_one_replica(params: Params, prompts: Prompts, key: jax.Array) -> tuple[Rollouts, jax.Array]:
        # Inside there is no axis left to split prompts over.
        rules = [rule for rule in nn.get_logical_axis_rules() if rule[0] != "prompt"]
        with nn.logical_axis_rules(rules):
            return decode(params, prompts, key, decoding)

    everywhere, split = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        of_one_replica,
        in_specs=(everywhere, split, everywhere),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )(params, prompts, key)
