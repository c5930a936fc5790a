"""Response tokens per second of one GRPO update, with and without prompts shared by their samples, and of a baseline.

One AdamW step on --prompts groups of --samples responses, all of full length, with random advantages. FLOPs count the
matrices and attention, forward and backward, without recomputation, and the head at response positions only. The peak
is the fastest of the runs of one large matrix product. With --compare=transformers the same update of the same model
runs in PyTorch between these runs, in float32; with --compare=autocast under bfloat16 autocast, which takes minutes
on a CPU that emulates it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rpt_jax.bench.measure import interleaved, matmul_call, round_to_4_digits
from rpt_jax.bench.options import (
    add_compute_options,
    add_logit_chunk_option,
    add_model_options,
    chosen_model,
    policy_config,
    positive,
)
from rpt_jax.bench.peer import transformers_update
from rpt_jax.config import ObjectiveConfig, OptimizerConfig
from rpt_jax.distributed.mesh import make_mesh, num_batch_shards, use_mesh
from rpt_jax.distributed.sharding import init_optimizer, init_parameters, shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.model.flops import attention_flops
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.setup import make_policy

_PEAK = "peak matmul"
_BASELINE_MICROBATCH = 32  # Responses per forward and backward pass of the baseline.


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    add_model_options(parser)
    parser.add_argument("--prompts", type=positive, default=32)
    parser.add_argument("--samples", type=positive, default=8, help="responses per prompt")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="tokens per prompt")
    parser.add_argument("--response-tokens", type=positive, default=128, help="tokens per response")
    parser.add_argument("--microbatch-tokens", type=positive, default=4608, help="tokens per pass on each device")
    add_compute_options(parser, remat="none")
    add_logit_chunk_option(parser)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--compare", choices=("transformers", "autocast"), help="baseline to measure in the same run")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table.

    Raises:
      UserError: an option is invalid or not available on this platform.
    """
    if options.microbatch_tokens < options.prompt_tokens + options.response_tokens:
        raise UserError(
            f"--microbatch-tokens={options.microbatch_tokens} must be at least --prompt-tokens + --response-tokens = "
            f"{options.prompt_tokens + options.response_tokens}.",
            field="--microbatch-tokens",
        )

    # The updates, and the product that measures the peak.
    config = chosen_model(options)
    batch = make_batch(options, config)
    calls = {
        "shared": update_call(options, config, batch),
        "not shared": update_call(options, config, unshared(batch)),
    }
    if options.compare:
        calls |= transformers_update(config, batch, _BASELINE_MICROBATCH, autocast=options.compare == "autocast")
    calls[_PEAK], peak_flops = matmul_call(options.dtype)
    seconds = interleaved(calls, options.repeats)

    # Tokens and FLOPs per second.
    peak = peak_flops / seconds[_PEAK].fastest
    tokens = batch.tokens_PxGxT.size
    rows = []
    for name, s in seconds.items():
        prompts_per_group = 1 if name == "shared" else options.samples
        flops = peak_flops if name == _PEAK else update_flops(options, config, prompts_per_group)
        tokens_per_second = 0.0 if name == _PEAK else tokens / s.median
        flops_per_second = flops / s.median
        figures = [s.median, s.fastest, s.slowest, tokens_per_second, flops_per_second / 1e9, flops_per_second / peak]
        rows.append([name, *map(round_to_4_digits, figures)])
    return ["update", "seconds", "fastest", "slowest", "response tokens/s", "GFLOP/s", "fraction of peak"], rows


def make_batch(options: argparse.Namespace, config: ModelConfig) -> UpdateBatch:
    """Return random tokens and advantages, with every prompt and every response at full length."""
    rng: Any = np.random.default_rng(0)
    groups = (options.prompts, options.samples)
    tokens = rng.integers(0, config.vocab, (*groups, options.response_tokens)).astype(np.int32)
    return UpdateBatch(
        prompts_PxS=rng.integers(0, config.vocab, (options.prompts, options.prompt_tokens)).astype(np.int32),
        lengths_P=_host(np.full(options.prompts, options.prompt_tokens, np.int32)),
        window_P=_host(np.arange(options.prompts, dtype=np.int32)),
        tokens_PxGxT=tokens,
        mask_PxGxT=_host(np.ones(tokens.shape, bool)),
        sampler_logprobs_PxGxT=_host(np.zeros(tokens.shape, np.float32)),
        advantages_PxG=rng.standard_normal(groups).astype(np.float32),
        counted_P=_host(np.ones(options.prompts, bool)),
    )


def unshared(batch: UpdateBatch) -> UpdateBatch:
    """Return the same responses as groups of one, each with its own copy of the prompt."""
    samples = batch.tokens_PxGxT.shape[1]
    prompts = len(batch.lengths_P) * samples

    def repeat(x: Any) -> Any:
        return np.repeat(x, samples, axis=0)

    def ungroup(x: Any) -> Any:
        return x.reshape(prompts, 1, *x.shape[2:])

    return UpdateBatch(
        prompts_PxS=repeat(batch.prompts_PxS),
        lengths_P=repeat(batch.lengths_P),
        window_P=_host(np.arange(prompts, dtype=np.int32)),
        tokens_PxGxT=ungroup(batch.tokens_PxGxT),
        mask_PxGxT=ungroup(batch.mask_PxGxT),
        sampler_logprobs_PxGxT=ungroup(batch.sampler_logprobs_PxGxT),
        advantages_PxG=ungroup(batch.advantages_PxG),
        counted_P=repeat(batch.counted_P),
    )


def _host(x: np.ndarray) -> Any:
    """Return a host array where the type says device array: the batch is moved to the devices before it is used."""
    return x


def update_call(options: argparse.Namespace, config: ModelConfig, batch: UpdateBatch) -> Callable[[], Any]:
    """Return a call that takes one optimizer step from the state that the previous call left."""
    policy = make_policy(policy_config(options), config)
    mesh = make_mesh(-1, 1, 1)
    optimizer = make_optimizer(OptimizerConfig(), total_steps=1)
    objective = ObjectiveConfig()
    limits = UpdateLimits(
        minibatches=1,
        rows=num_batch_shards(mesh),
        microbatch_tokens=options.microbatch_tokens,
        logit_chunk_tokens=options.logit_chunk_tokens,
        temperature=1.0,
        max_new_tokens=options.response_tokens,
    )
    with use_mesh(mesh):
        params = init_parameters(policy, mesh, seed=0)
        state = TrainState(params=params, optimizer=init_optimizer(optimizer, params, mesh))
        batch = shard_prompts(batch, mesh)
    # The update donates its state, so only the list may hold it.
    states = [state]
    del state, params

    def call() -> jax.Array:
        with use_mesh(mesh):
            state, metrics = update_policy(policy, optimizer, objective, limits, states.pop(), batch)
        states.append(state)
        return jax.block_until_ready((state, metrics))[1]["gradient/norm"]

    return call


def update_flops(options: argparse.Namespace, config: ModelConfig, prompts_per_group: int) -> float:
    """Return the FLOPs of a step that runs each prompt `prompts_per_group` times.

    The trunk runs on all tokens, the head at response positions only; attention is causal.
    """
    head = config.vocab * config.width
    prompt = options.prompt_tokens
    response = options.response_tokens
    prompt_tokens = prompts_per_group * prompt
    response_tokens = options.samples * response
    pairs = prompts_per_group * prompt * (prompt + 1) // 2
    pairs += options.samples * (response * prompt + response * (response + 1) // 2)
    matmul = (config.matmul_parameters - head) * (prompt_tokens + response_tokens) + head * response_tokens
    return options.prompts * (6.0 * matmul + 3.0 * attention_flops(config, pairs))
