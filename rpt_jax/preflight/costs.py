"""Estimates for the programs of a step at full lengths: FLOPs, trip counts of loops, and time."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.describe import derive
from rpt_jax.distributed.mesh import DECODING, mesh_fields, num_batch_shards
from rpt_jax.infra.chips import Chip
from rpt_jax.model.attention.blocked_cache import CacheSizes
from rpt_jax.model.attention.blockwise import BLOCK_SIZES
from rpt_jax.model.attention.cache_mosaic import own_cache_bytes, shared_cache_bytes
from rpt_jax.model.attention.dispatch import KERNELS
from rpt_jax.model.attention.key_ranges import QUERY_PANEL_SIZES, ROW_BLOCK_SIZES, KeyRanges, make_key_ranges, row_size
from rpt_jax.model.attention.packed_mosaic import packed_attention_bytes
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.preflight.hlo import Traffic
from rpt_jax.preflight.programs import ProgramName, Step
from rpt_jax.rollout.engine import live_sizes, steps_per_check
from rpt_jax.rollout.kv_cache import CACHE_LAYOUTS, CacheLayout, own_block_size
from rpt_jax.rollout.memory import cache_bytes
from rpt_jax.rollout.sampling_mosaic import read_blocks_bytes

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


def minibatch_rows(experiment: Experiment) -> int:
    """Return the number of rows of `training.microbatch_tokens` in a minibatch at full lengths.

    A row holds whole groups or, if a group is longer than a row, the prompt and as many of its responses as fit.
    """
    training = experiment.training
    prompt = experiment.prompt.max_tokens
    response = experiment.rollout.max_new_tokens
    samples = experiment.rollout.samples_per_prompt
    responses_per_row = (training.microbatch_tokens - prompt) // response
    prompts = -(-training.prompts_per_step // training.minibatches_per_step)
    if responses_per_row >= samples:
        groups_per_row = training.microbatch_tokens // (prompt + samples * response)
        return -(-prompts // groups_per_row)
    return prompts * -(-samples // max(1, responses_per_row))


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
    update *= max(1.0, experiment.training.minibatches_per_step * minibatch_rows(experiment) * row / tokens)
    return flops | {
        ProgramName.SAMPLE: rpt.flops.sampling / chips,
        ProgramName.TRAINING_REWARD: rpt.flops.reward / chips,
        ProgramName.UPDATE: update,
    }


class DecodeLoop(NamedTuple):
    """What one of a replica's decode loops does if all responses have full length.

    Attributes:
      trips: trip count.
      slots: rollouts that it can decode at once.
      live: rollouts that it does decode at once.
      prompts: prompts that these belong to, on average.
    """

    trips: int
    slots: int
    live: int
    prompts: float


def decode_loops(experiment: Experiment, step: Step) -> tuple[DecodeLoop, ...]:
    """Return the decode loops of a replica, which has an equal part of the prompts and of the decode slots."""
    assert step.decoding is not None
    replicas = num_batch_shards(step.mesh, DECODING)
    samples = experiment.rollout.samples_per_prompt
    rollouts = prompts_per_replica(experiment, step) * samples
    sizes = live_sizes(-(-step.decoding.slots // replicas), rollouts)
    full, rest = divmod(rollouts, sizes[0])
    # The first token of a response comes from the prefill.
    trips = -(-(experiment.rollout.max_new_tokens - 1) // steps_per_check(step.decoding))

    def num_prompts(first: int, end: int) -> int:
        return (end - 1) // samples - first // samples + 1

    loops = [DecodeLoop(trips=0, slots=size, live=0, prompts=0) for size in sizes]
    waves = [num_prompts(wave * sizes[0], (wave + 1) * sizes[0]) for wave in range(full)]
    loops[0] = loops[0]._replace(trips=full * trips, live=sizes[0], prompts=sum(waves) / full)
    if rest:
        # The smallest batch that holds the rollouts that are left. If that is the largest one, its idle slots count as live.
        last = max(index for index, size in enumerate(sizes) if size >= rest)
        if last == 0:
            loops[0] = loops[0]._replace(trips=(full + 1) * trips)
        else:
            loops[last] = DecodeLoop(trips, sizes[last], rest, num_prompts(rollouts - rest, rollouts))
    return tuple(loops)


def prompts_per_replica(experiment: Experiment, step: Step) -> int:
    """Return how many prompts of a step each replica samples responses to."""
    return -(-experiment.training.prompts_per_step // num_batch_shards(step.mesh, DECODING))


def kernel_bytes(experiment: Experiment, step: Step) -> dict[str, Callable[[int], float]]:
    """Return functions that map the number of rows of a kernel call to the bytes that it reads and writes, at full lengths.

    Rows are the first axis of a kernel's results: rows of an update, or decode slots. The keys are names in the HLO
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

    # A decode step: the cache of a rollout's own tokens grows from empty to full.
    layout = CACHE_LAYOUTS["tpu"]
    own_keys = _own_keys(experiment)
    prompt = experiment.prompt.max_tokens
    own = CacheSizes(
        num_queries=config.heads // config.kv_heads,
        block=_own_block(experiment, step, layout),
        kv_heads=-(-config.kv_heads // fields["rollout_tensor"]),
        head_size=config.head_size,
        itemsize=itemsize,
    )
    own_blocks = (-(-own_keys // own.block) + 1) / 2
    loops = decode_loops(experiment, step)

    # The cache of the prompts has a row for each prompt and, once few rollouts are live, a row for each rollout.
    prompts = prompts_per_replica(experiment, step)
    shared = own._replace(block=layout.block_size(layout.prompt_block, prompt))
    prompt_blocks = -(-prompt // shared.block)
    parts = KERNELS["tpu_kernels"].cache.row_parts(shared, experiment.rollout.samples_per_prompt)
    shared_bytes = []
    own_bytes = []
    for loop in loops:
        rows = loop.prompts * parts if loop.slots > prompts or loop is loops[0] else loop.live
        shared_read = shared_cache_bytes(shared, rollouts=loop.live, visits=rows * prompt_blocks)
        own_read = own_cache_bytes(own, slots=loop.slots, visits=loop.live * own_blocks, shared_caches=1)
        shared_bytes.append(_CallBytes(loop.trips, loop.slots, shared_read))
        own_bytes.append(_CallBytes(loop.trips, loop.slots, own_read))
    return {
        **{name: functools.partial(operator.mul, kv_heads * size) for name, size in packed.items()},
        "read_blocks": read_blocks_bytes,
        "own_cache_blocks": functools.partial(_mean_bytes, own_bytes),
        "shared_cache_blocks": functools.partial(_mean_bytes, shared_bytes),
    }


def _own_keys(experiment: Experiment) -> int:
    """Return the keys of a rollout's own tokens: the last token of a response is never run."""
    return max(experiment.rollout.max_new_tokens - 1, 1)


def _own_block(experiment: Experiment, step: Step, layout: CacheLayout) -> int:
    """Return the keys per block of a rollout's own tokens."""
    config = step.policy.config
    return own_block_size(
        layout,
        _own_keys(experiment),
        kv_heads=-(-config.kv_heads // mesh_fields(step.mesh)["rollout_tensor"]),
        head_size=config.head_size,
        itemsize=step.policy.dtype.itemsize,
    )


class _CallBytes(NamedTuple):
    """What the decode steps of a loop read and write of a cache in each layer.

    Attributes:
      trips: trip count of the loop.
      slots: slots of the loop.
      bytes: per call of the kernel.
    """

    trips: int
    slots: int
    bytes: float


def _mean_bytes(calls: Sequence[_CallBytes], slots: int) -> float:
    """Return the bytes of a kernel call with `slots` slots: the mean over the loops that have so many."""
    found = [call for call in calls if call.slots == slots and call.trips]
    return sum(call.trips * call.bytes for call in found) / sum(call.trips for call in found) if found else 0.0


def least_sampling_bytes(experiment: Experiment, step: Step) -> float:
    """Return the bytes that sampling has to read on a chip at full lengths, without the prefill.

    These are all weights, and the keys and values of the live rollouts, once per decode step.
    """
    assert step.decoding is not None
    config = step.policy.config
    chips_per_replica = mesh_fields(step.mesh)["rollout_tensor"]
    itemsize = step.policy.dtype.itemsize
    head_itemsize = 2 if step.policy.head_precision == "bfloat16" else 4
    weights = config.layer_matrix_parameters * itemsize + config.vocab * config.width * head_itemsize
    token = cache_bytes(config, step.policy.dtype.name)
    # The last token of a response is never run.
    response = experiment.rollout.max_new_tokens - 1
    total = 0.0
    for loop in decode_loops(experiment, step):
        tokens = loop.live * response / 2 + loop.prompts * experiment.prompt.max_tokens
        total += loop.trips * steps_per_check(step.decoding) * (weights + tokens * token)
    return total / chips_per_replica


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

    # Sampling.
    prompts = prompts_per_replica(experiment, step)
    prefill_tokens = experiment.rollout.prefill_tokens
    chunks = -(-prompt // prefill_tokens)
    rows = min(prompts, max(1, prefill_tokens // -(-prompt // chunks)))
    layout = CACHE_LAYOUTS[platform]
    own_blocks = -(-_own_keys(experiment) // _own_block(experiment, step, layout))
    decode_trips = tuple(loop.trips for loop in decode_loops(experiment, step)) if step.decoding else (1,)

    # Update: the loops are those of a minibatch, and each device runs one row per pass. A panel of queries visits as many key
    # blocks as the query that attends to most keys: a prompt and, on average, half of a response.
    passes = -(-minibatch_rows(experiment) // num_batch_shards(step.mesh))
    packed_blocks = (prompt + (response + min(QUERY_PANEL_SIZES[platform], response)) / 2) / ROW_BLOCK_SIZES[platform]

    return {
        "decode_loop": decode_trips,
        # The cache of a rollout's own tokens grows from empty to full.
        "own_cache_blocks": ((own_blocks + 1) / 2,),
        "shared_cache_blocks": (-(-prompt // layout.block_size(layout.prompt_block, prompt)),),
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
