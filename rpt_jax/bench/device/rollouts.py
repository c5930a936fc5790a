"""Decoding: tokens per second, and the share of the bound by bytes and FLOPs.

All rollouts are live from the first to the last step, because none stops before its length limit. So the loop is compiled for
one size of the batch only, which is the first of those that a run compiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rpt_jax.bench.device.ceilings import Ceilings, measure_ceilings, this_chip
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.sizes import SAMPLES, Sizes, Workload
from rpt_jax.bench.rollout import keys_read
from rpt_jax.config import PolicyConfig
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.sharding import init_parameters
from rpt_jax.infra.chips import Chip
from rpt_jax.model.flops import causal_pairs, forward_flops
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.model.transformer import Params, Transformer, in_compute_dtype
from rpt_jax.rollout.decode import prepare_decode_params
from rpt_jax.rollout.engine import DecodeInputs, DecodeState, decode_until, start_decoding
from rpt_jax.rollout.memory import cache_bytes, device_memory, rollout_memory
from rpt_jax.rollout.prefix_sharing import Prompts, separate
from rpt_jax.rollout.rollouts import Decoding
from rpt_jax.setup import make_policy

DTYPE = "bfloat16"
HEAD_PRECISION = "bfloat16"

_REPEATS = 3  # Of runs, after the one that compiles.
_LONG_SECONDS = 5.0  # A run that takes longer is not repeated.


class DecodePrograms(NamedTuple):
    """The two halves of sampling, as compiled programs.

    Attributes:
      start: prefills the prompts and samples the first token of every rollout.
      decode: decodes the other tokens. It takes the results of `start`, of which it uses up the state.
    """

    start: Callable[[], tuple[DecodeInputs, DecodeState]]
    decode: Callable[[DecodeInputs, DecodeState], DecodeState]


class Decoded(NamedTuple):
    """Seconds of a run.

    Attributes:
      prefill: of `DecodePrograms.start`.
      decode: of `DecodePrograms.decode`.
      steps: that it took.
    """

    prefill: float
    decode: float
    steps: int


def random_policy(config: ModelConfig, attention: str = "auto") -> tuple[Transformer, Params]:
    """Return a policy that computes in bfloat16, with random weights as sampling uses them."""
    policy = make_policy(PolicyConfig(dtype=DTYPE, head_precision=HEAD_PRECISION, attention=attention), config)
    mesh = make_mesh(-1, 1, 1)
    with use_mesh(mesh):
        params = init_parameters(policy, mesh, seed=0)
    return policy, jax.jit(in_compute_dtype, static_argnums=0)(policy, params)


def random_prompts(config: ModelConfig, workload: Workload) -> Prompts:
    """Return prompts of full length that share nothing with each other."""
    dims = (workload.prompts, workload.prompt_tokens)
    prompts_PxS = np.random.default_rng(0).integers(0, config.vocab, dims, dtype=np.int32)
    lengths_P = np.full(workload.prompts, workload.prompt_tokens, np.int32)
    return separate(prompts_PxS, lengths_P, np.arange(workload.prompts, dtype=np.int32))


def decoding_of(workload: Workload) -> Decoding:
    """Return the sampling parameters: no response ends before its limit."""
    return Decoding(samples=SAMPLES, max_new_tokens=workload.response_tokens, temperature=0.8, stop_ids=())


def decode_programs(policy: Transformer, params: Params, prompts: Prompts, decoding: Decoding) -> DecodePrograms:
    """Return the programs that sample responses to the prompts."""
    key = jax.random.key(0)

    def start(params: Params, prompts: Prompts) -> tuple[Any, DecodeState]:
        inputs, state = start_decoding(policy, params, prompts, key, None, decoding)
        # Parameters would be copied, and what is static would become an array.
        return inputs._replace(params=None, unshared=None), state

    def decode(params: Params, inputs: DecodeInputs, state: DecodeState) -> DecodeState:
        inputs = inputs._replace(params=prepare_decode_params(policy, params), unshared=False)
        return decode_until(policy, decoding, inputs, state, running=0)

    start_jit = jax.jit(start)
    decode_jit = jax.jit(decode, donate_argnums=2)
    return DecodePrograms(
        start=lambda: start_jit(params, prompts), decode=lambda inputs, state: decode_jit(params, inputs, state)
    )


def run(programs: DecodePrograms) -> Decoded:
    """Sample once."""
    start = time.perf_counter()
    inputs, state = jax.block_until_ready(programs.start())
    started = time.perf_counter()
    state = jax.block_until_ready(programs.decode(inputs, state))
    seconds = time.perf_counter() - started
    return Decoded(prefill=started - start, decode=seconds, steps=int(state.step))


def fitting(workload: Workload, config: ModelConfig, resident: int) -> Workload:
    """Return the workload with as many live rollouts as the memory holds, by the plan that a run makes."""
    memory = rollout_memory(
        config,
        DTYPE,
        prompts=workload.prompts,
        prompt_tokens=workload.prompt_tokens,
        samples=SAMPLES,
        max_new_tokens=workload.response_tokens,
        tensor=1,
    )
    slots = memory.slots_within(device_memory() - resident)
    return workload._replace(live=max(SAMPLES, min(workload.live, slots // SAMPLES * SAMPLES)))


def decode_bounds(
    workload: Workload, config: ModelConfig, weight_bytes: int, prompts: Prompts, ceilings: Ceilings | Chip
) -> dict[str, float]:
    """Return the seconds in which decoding could read its bytes, and compute its FLOPs, at the given rates.

    Every step reads all weights, the keys and values of every live rollout, and those of each prompt once for its rollouts.
    """
    decoded = workload.live * (workload.response_tokens - 1)
    lengths_PxG = np.full((workload.prompts, SAMPLES), workload.response_tokens)
    size = (workload.response_tokens - 1) * weight_bytes
    size += keys_read(lengths_PxG, prompts) * cache_bytes(config, DTYPE)
    pairs = workload.live * causal_pairs(workload.response_tokens - 1, workload.prompt_tokens)
    flops = forward_flops(config, tokens=decoded, pairs=pairs, head_tokens=decoded)
    if isinstance(ceilings, Chip):
        return {"bytes": size / ceilings.memory_speed, "FLOPs": flops / ceilings.flops}
    return {"bytes": size / ceilings.bytes_per_second, "FLOPs": flops / ceilings.flops_per_second}


def measure(report: Report, sizes: Sizes) -> None:
    """Measure decoding of every workload."""
    ceilings = measure_ceilings(sizes)
    policies: dict[str, tuple[Transformer, Params]] = {}
    for workload in sizes.workloads:
        with report.measurement(f"{workload}"):
            if workload.model not in policies:
                policies[workload.model] = random_policy(preset(workload.model))
            _measure_workload(report, workload, *policies[workload.model], ceilings)


def _measure_workload(
    report: Report, workload: Workload, policy: Transformer, params: Params, ceilings: Ceilings
) -> None:
    config = policy.config
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    asked = workload.live
    workload = fitting(workload, config, resident=weight_bytes)
    if workload.live < asked:
        report.note(
            f"{workload.model}, context {workload.context}: {workload.live} live rollouts fit instead of {asked}."
        )
    prompts = random_prompts(config, workload)
    programs = decode_programs(policy, params, prompts, decoding_of(workload))

    start = time.perf_counter()
    run(programs)
    first_seconds = time.perf_counter() - start
    runs = [run(programs)]
    if runs[0].decode < _LONG_SECONDS:
        runs += [run(programs) for _ in range(_REPEATS - 1)]
    seconds = statistics.median(each.decode for each in runs)
    prefill_seconds = statistics.median(each.prefill for each in runs)
    decoded = workload.live * (workload.response_tokens - 1)

    measured = decode_bounds(workload, config, weight_bytes, prompts, ceilings)
    chip = this_chip()
    published = decode_bounds(workload, config, weight_bytes, prompts, chip) if chip else None
    report.figure(
        model=workload.model,
        live=workload.live,
        context=workload.context,
        attention=policy.attention,
        tokens_per_second=decoded / seconds,
        step_ms=1000 * seconds / runs[0].steps,
        bound=max(measured, key=lambda name: measured[name]),
        of_measured_bound=max(measured.values()) / seconds,
        of_published_bound=published and max(published.values()) / seconds,
        prefill_seconds=prefill_seconds,
        with_prefill=workload.live * workload.response_tokens / (prefill_seconds + seconds),
        fastest=decoded / min(each.decode for each in runs),
        slowest=decoded / max(each.decode for each in runs),
        first_run_seconds=first_seconds,
    )
