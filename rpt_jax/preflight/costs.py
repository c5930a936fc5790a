"""Estimates for the programs of a step at full lengths: FLOPs, trip counts of loops, and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.describe import derive
from rpt_jax.distributed.mesh import DECODING, mesh_fields, num_batch_shards
from rpt_jax.infra.chips import Chip
from rpt_jax.model.attention.blockwise import BLOCK_SIZES
from rpt_jax.model.attention.cache_mosaic import cached_attention_bytes
from rpt_jax.model.attention.key_ranges import QUERY_PANEL_SIZES, ROW_BLOCK_SIZES, KeyRanges, make_key_ranges, row_size
from rpt_jax.model.attention.packed_mosaic import packed_attention_bytes
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.preflight.hlo import Traffic
from rpt_jax.preflight.programs import ProgramName, Step
from rpt_jax.rollout.engine import live_sizes, steps_per_check
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
        # Forward, recomputed forward and backward instead of forward and backward. The last is two forward passes, or one if the
        # weights are frozen.
        update *= 3 / 2 if step.policy.lora else 4 / 3
    tokens = experiment.training.prompts_per_step * rpt.tokens.shared_tokens_per_prompt
    row = row_size(experiment.training.microbatch_tokens, step.mesh.devices.flat[0].platform)
    update *= max(1.0, update_rows(experiment) * row / tokens)
    return flops | {
        ProgramName.SAMPLE: rpt.flops.sampling / chips,
        ProgramName.TRAINING_REWARD: rpt.flops.reward / chips,
        ProgramName.UPDATE: update,
    }


def kernel_bytes_per_row(experiment: Experiment, step: Step) -> dict[str, float]:
    """Return the bytes that each kernel reads and writes on a chip for every row, at full lengths.

    Rows are the first axis of a kernel's results: rows of an update, or rows of a KV cache. The keys are names in the HLO
    metadata: the kernel's, or that of the scope around it where several calls run one kernel.

    These kernels read only the blocks of keys that are attended to, which the compiled program does not show. For GPUs, preflight
    compiles no kernels.
    """
    if step.decoding is None or step.mesh.devices.flat[0].platform != "tpu":
        return {}
    config = step.policy.config
    fields = mesh_fields(step.mesh)
    heads_per_kv = config.heads // config.kv_heads
    itemsize = step.policy.dtype.itemsize

    # Packed rows, with the device's share of the kv heads.
    packed = packed_attention_bytes(
        full_row(experiment), heads_per_kv=heads_per_kv, head_size=config.head_size, itemsize=itemsize
    )
    kv_heads = -(-config.kv_heads // fields["tensor"])
    traffic = {name: kv_heads * size for name, size in packed.items()}

    # A decode step: the cache of a rollout's own tokens grows from empty to full; all rollouts of a prompt share its keys.
    layout = CACHE_LAYOUTS["tpu"]
    response = experiment.rollout.max_new_tokens
    prompt = experiment.prompt.max_tokens
    own_block = min(layout.own_block, response)
    prompt_block = min(layout.prompt_block, prompt)
    kv_heads = -(-config.kv_heads // fields["rollout_tensor"])
    sizes = {"kv_heads": kv_heads, "head_size": config.head_size, "itemsize": itemsize}
    return traffic | {
        "own_cache_blocks": cached_attention_bytes(
            rows=1,
            num_queries=heads_per_kv,
            blocks_per_row=(-(-response // own_block) + 1) / 2,
            block=own_block,
            **sizes,
        ),
        "shared_cache_blocks": cached_attention_bytes(
            rows=1,
            num_queries=experiment.rollout.samples_per_prompt * heads_per_kv,
            blocks_per_row=-(-prompt // prompt_block),
            block=prompt_block,
            **sizes,
        ),
    }


class _Replica(NamedTuple):
    """The part of a step's sampling that each replica does.

    Attributes:
      prompts: its prompts.
      live_sizes: rollouts that it decodes at once, in each of its decode loops.
    """

    prompts: int
    live_sizes: Sequence[int]


def _replica(experiment: Experiment, step: Step) -> _Replica:
    replicas = num_batch_shards(step.mesh, DECODING)
    prompts = -(-experiment.training.prompts_per_step // replicas)
    rollouts = prompts * experiment.rollout.samples_per_prompt
    sizes = live_sizes(-(-step.decoding.slots // replicas), rollouts) if step.decoding else [1]
    return _Replica(prompts=prompts, live_sizes=sizes)


def decode_trips(rollouts: int, live_sizes: Sequence[int], response: int, steps_per_check: int) -> tuple[int, ...]:
    """Return the trip count of each decode loop of a replica if all responses have full length.

    Args:
      rollouts: rollouts of the replica.
      live_sizes: rollouts that are decoded at once in each loop.
      response: tokens of a response; the first one comes from the prefill.
      steps_per_check: decode steps of an iteration.
    """
    full, rest = divmod(rollouts, live_sizes[0])
    response_trips = -(-(response - 1) // steps_per_check)
    trips = [0] * len(live_sizes)
    trips[0] = full * response_trips
    if rest:
        # The smallest batch that holds the rollouts that are left.
        trips[max(index for index, size in enumerate(live_sizes) if size >= rest)] += response_trips
    return tuple(trips)


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
    prompts, sizes = _replica(experiment, step)
    prefill_tokens = experiment.rollout.prefill_tokens
    chunks = -(-prompt // prefill_tokens)
    rows = min(prompts, max(1, prefill_tokens // -(-prompt // chunks)))
    layout = CACHE_LAYOUTS[platform]
    own_blocks = -(-response // layout.own_block)
    decode_steps = steps_per_check(step.decoding) if step.decoding else 1

    # Update: each device runs one row per pass. A panel of queries visits as many key blocks as the query that attends to
    # most keys: a prompt and, on average, half of a response.
    passes = -(-update_rows(experiment) // num_batch_shards(step.mesh))
    packed_blocks = (prompt + (response + min(QUERY_PANEL_SIZES[platform], response)) / 2) / ROW_BLOCK_SIZES[platform]

    return {
        "decode_loop": decode_trips(prompts * samples, sizes, response, decode_steps),
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
