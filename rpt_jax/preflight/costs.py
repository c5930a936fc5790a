"""Estimates for the programs of a step at full lengths: FLOPs, trip counts of loops, and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.describe import derive
from rpt_jax.distributed.mesh import DECODING, mesh_fields, num_batch_shards
from rpt_jax.infra.chips import Chip
from rpt_jax.model.attention.blockwise import BLOCK_SIZES
from rpt_jax.model.attention.key_ranges import QUERY_PANEL_SIZES, ROW_BLOCK_SIZES, KeyRanges, make_key_ranges, row_size
from rpt_jax.model.attention.packed_mosaic import packed_attention_bytes
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.preflight.hlo import Traffic
from rpt_jax.preflight.programs import ProgramName, Step
from rpt_jax.rollout.engine import live_sizes
from rpt_jax.rollout.kv_cache import CACHE_LAYOUTS

# Bytes per token of text, about: the reward reads one byte per iteration.
_BYTES_PER_TOKEN = 4


class Times(NamedTuple):
    """Seconds that a chip would take for each part at its published figures; the longest one is the bound."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """Name of the longest part."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The longest part, as if the others overlapped with it completely: a lower bound of a real run's time."""
        return max(self)


def estimate_times(chip: Chip, flops: float, traffic: Traffic) -> Times:
    """Return the time of a program on a chip.

    Args:
      chip: published figures.
      flops: FLOPs per chip.
      traffic: data moved per chip.
    """
    between_hosts = chip.network_speed or chip.link_speed
    network = sum(size / (chip.link_speed if c.in_host else between_hosts) for c, size in traffic.sent.items())
    return Times(compute=flops / chip.flops, memory=traffic.memory / chip.memory_speed, network=network)


def update_rows(experiment: Experiment) -> int:
    """Return the number of rows of `training.microbatch_tokens` in an update at full lengths.

    A row holds whole groups or, if a group is longer than a row, the prompt and as many of its responses as fit.
    """
    training = experiment.training
    prompt = experiment.prompt.max_tokens
    response = experiment.rollout.max_new_tokens
    samples = experiment.rollout.samples_per_prompt
    responses_per_row = (training.microbatch_tokens - prompt) // response
    if responses_per_row >= samples:
        groups_per_row = training.microbatch_tokens // (prompt + samples * response)
        return -(-training.prompts_per_step // groups_per_row)
    return training.prompts_per_step * -(-samples // max(1, responses_per_row))


def flops_per_chip(experiment: Experiment, step: Step) -> dict[str, float]:
    """Return the FLOPs of each program on each chip; programs with negligible FLOPs are left out.

    In addition to what `describe` counts, an update runs a prompt once in every row that holds responses to it, and full
    rematerialization runs the forward pass twice.
    """
    chips = step.mesh.size
    derived = derive(experiment, chips)
    score = derived.score
    rpt = derived.rpt
    flops: dict[str, float] = {ProgramName.SCORE: score.flops_per_batch / chips if score else 0.0}
    if rpt is None:
        return flops

    # The update: as `describe` counts it, with what is recomputed and what is repeated.
    update = (rpt.flops.update + rpt.flops.documents) / chips
    if experiment.policy.remat == "full":
        update *= 4 / 3  # Forward, recomputed forward and backward instead of forward and backward.
    tokens = experiment.training.prompts_per_step * rpt.tokens.shared_tokens_per_prompt
    update *= max(1.0, update_rows(experiment) * experiment.training.microbatch_tokens / tokens)
    return flops | {
        ProgramName.SAMPLE: rpt.flops.sampling / chips,
        ProgramName.TRAINING_REWARD: rpt.flops.reward / chips,
        ProgramName.UPDATE: update,
    }


def kernel_bytes_per_chip(experiment: Experiment, step: Step) -> dict[str, float]:
    """Return the bytes that a run of each kernel for packed rows reads and writes on a chip, by its name, at full lengths.

    These kernels read a block of keys once for each block of queries that attends to it, which the compiled program does not
    show. The kernels for TPUs only: for GPUs, preflight compiles none.
    """
    if step.decoding is None or step.mesh.devices.flat[0].platform != "tpu":
        return {}
    config = step.policy.config
    traffic = packed_attention_bytes(
        full_row(experiment),
        heads_per_kv=config.heads // config.kv_heads,
        head_size=config.head_size,
        itemsize=step.policy.dtype.itemsize,
    )
    # Each device runs one row, with its share of the kv heads.
    kv_heads = -(-config.kv_heads // mesh_fields(step.mesh)["tensor"])
    return {name: kv_heads * size for name, size in traffic.items()}


def full_row(experiment: Experiment) -> KeyRanges:
    """Return the key ranges of a row of an update on a TPU in which every prompt and every response has full length."""
    prefix = experiment.prompt.max_tokens - 1
    response = experiment.rollout.max_new_tokens
    samples = experiment.rollout.samples_per_prompt
    size = row_size(experiment.training.microbatch_tokens, "tpu")
    groups = max(1, size // (prefix + samples * response))
    responses = min(samples, (size - prefix) // response)

    # Responses from the left, the prefixes that they continue from the right; what is left over attends to itself.
    index_W = np.arange(size, dtype=np.int32)
    prefix_begin_W = np.zeros(size, np.int32)
    prefix_end_W = np.zeros(size, np.int32)
    own_begin_W = index_W.copy()
    for group in range(groups):
        begin = size - (group + 1) * prefix
        own_begin_W[begin : begin + prefix] = begin
        for start in range(group * responses * response, (group + 1) * responses * response, response):
            own_begin_W[start : start + response] = start
            prefix_begin_W[start : start + response] = begin
            prefix_end_W[start : start + response] = begin + prefix
    return make_key_ranges(
        jnp.asarray(np.stack([prefix_begin_W, own_begin_W])[None]),
        jnp.asarray(np.stack([prefix_end_W, index_W + 1])[None]),
        ROW_BLOCK_SIZES["tpu"],
    )


def trip_counts(experiment: Experiment, step: Step) -> Mapping[str, tuple[float, ...]]:
    """Return the trip counts of data-dependent loops at full lengths, by the `jax.named_scope` around each.

    A scope with several loops has one count for each, in program order; the last count holds for all further loops.
    """
    platform = target_platform()
    prompt = experiment.prompt.max_tokens
    response = experiment.rollout.max_new_tokens
    samples = experiment.rollout.samples_per_prompt

    # Sampling: each replica has an equal part of the prompts and of the decode slots.
    replicas = num_batch_shards(step.mesh, DECODING)
    prompts = -(-experiment.training.prompts_per_step // replicas)
    prefill_tokens = experiment.rollout.prefill_tokens
    chunks = -(-prompt // prefill_tokens)
    rows = min(prompts, max(1, prefill_tokens // -(-prompt // chunks)))
    slots = live_sizes(-(-step.decoding.slots // replicas), prompts * samples)[0] if step.decoding else 1
    waves = -(-prompts * samples // slots)
    layout = CACHE_LAYOUTS[platform]
    own_blocks = -(-response // layout.own_block)

    # Update: each device runs one row per pass. A panel of queries visits as many key blocks as the query that attends to
    # most keys: a prompt and, on average, half of a response.
    passes = -(-update_rows(experiment) // num_batch_shards(step.mesh))
    packed_blocks = (prompt + (response + min(QUERY_PANEL_SIZES[platform], response)) / 2) / ROW_BLOCK_SIZES[platform]

    return {
        # All slots are live until the last rollouts end; the loops over smaller batches have nothing left to do.
        "decode_loop": (waves * (response - 1), 0),
        # The cache of a rollout's own tokens grows from empty to full.
        "own_cache_blocks": ((own_blocks + 1) / 2,),
        "shared_cache_blocks": (-(-prompt // layout.prompt_block),),
        "prefill_rows": (-(-prompts // rows),),
        "prefill_chunks": (chunks,),
        # Causal: half of the keys on average.
        "key_blocks": (max(1.0, prompt / BLOCK_SIZES[platform] / 2),),
        "policy_gradient": (passes,),
        "old_logprobs": (passes,),
        "packed_key_blocks": (packed_blocks,),
        # Compilers may name a loop within shard_map by the shard_map's scope alone.
        "packed_attention": (packed_blocks,),
        "read_box": (_BYTES_PER_TOKEN * response,),
    }
