"""Response tokens a second of one GRPO update: prompts shared by their samples, and not shared; and beside transformers.

One AdamW step on --prompts groups of --samples responses, all of full length, with random advantages. FLOPs are those of the
matrices and of attention, forward and backward, nothing recomputed counted, and of the head at response positions alone. The
ceiling is the fastest of as many runs of one large matrix product. With --beside=transformers the same update of the same shape
runs in PyTorch between our runs, in float32; with --beside=autocast under bfloat16 autocast, which takes minutes on a CPU that
has to emulate it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rpt_jax.bench.measure import interleaved, matmul_call
from rpt_jax.bench.peer import transformers_update
from rpt_jax.bench.policy import add_shape_options, chosen_shape
from rpt_jax.config import ObjectiveConfig, OptimizerConfig, PolicyConfig
from rpt_jax.config.schema import ATTENTIONS, REMATS
from rpt_jax.describe import attention_flops
from rpt_jax.distributed.sharding import (
    init_optimizer,
    init_parameters,
    make_mesh,
    num_batch_shards,
    shard_prompts,
    use_mesh,
)
from rpt_jax.errors import UserError
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.setup import make_policy

_CEILING = "ceiling"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shape_options(parser)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response")
    parser.add_argument("--microbatch-tokens", type=int, default=4608, help="tokens of a pass on each device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--remat", choices=REMATS, default="none")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens whose logits exist at one time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beside", choices=("transformers", "autocast"), help="measure this one too, in turns")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where a choice does not run here."""
    if options.microbatch_tokens < options.context + options.response:
        raise UserError(f"--microbatch-tokens={options.microbatch_tokens} does not hold a prompt and a response.")
    shape = chosen_shape(options)
    batch = make_batch(options, shape)
    calls = {
        "shared": update_call(options, shape, batch),
        "not shared": update_call(options, shape, unshared(batch)),
    }
    if options.beside:
        calls |= transformers_update(shape, batch, 32, options.beside == "autocast")
    calls[_CEILING], ceiling_flops = matmul_call(options.dtype)
    seconds = interleaved(calls, options.repeats)
    ceiling = ceiling_flops / seconds[_CEILING].low
    tokens, rows = batch.tokens_PxGxT.size, []
    for name, s in seconds.items():
        sharing = 1 if name == "shared" else options.samples
        flops = ceiling_flops if name == _CEILING else update_flops(options, shape, sharing)
        rate = 0.0 if name == _CEILING else tokens / s.median
        row = [s.median, s.low, s.high, rate, flops / s.median / 1e9, flops / s.median / ceiling]
        rows.append([name, *(float(f"{x:.4g}") for x in row)])
    return ["update", "seconds", "fastest", "slowest", "response tokens/s", "GFLOP/s", "of the ceiling"], rows


def make_batch(options: argparse.Namespace, shape: ModelConfig) -> UpdateBatch:
    """Random tokens and advantages; every prompt and every response is as long as it may be."""
    rng, groups = np.random.default_rng(0), (options.prompts, options.samples)
    tokens = rng.integers(0, shape.vocab, (*groups, options.response)).astype(np.int32)
    return UpdateBatch(
        prompts_PxS=rng.integers(0, shape.vocab, (options.prompts, options.context)).astype(np.int32),
        lengths_P=np.full(options.prompts, options.context, np.int32),
        window_P=np.arange(options.prompts, dtype=np.int32),
        tokens_PxGxT=tokens,
        mask_PxGxT=np.ones(tokens.shape, bool),
        sampler_logprobs_PxGxT=np.zeros(tokens.shape, np.float32),
        advantages_PxG=rng.standard_normal(groups).astype(np.float32),
        counted_P=np.ones(options.prompts, bool),
    )


def unshared(batch: UpdateBatch) -> UpdateBatch:
    """The same responses, each with a prompt of its own."""
    samples = batch.tokens_PxGxT.shape[1]
    names = ("prompts_PxS", "lengths_P", "counted_P")
    repeated = {name: np.repeat(getattr(batch, name), samples, axis=0) for name in names}
    repeated["window_P"] = np.arange(len(repeated["lengths_P"]), dtype=np.int32)
    alone = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), batch._replace(**dict.fromkeys(repeated)))
    return alone._replace(**repeated)


def update_call(options: argparse.Namespace, shape: ModelConfig, batch: UpdateBatch) -> Callable[[], Any]:
    """One optimizer step a call, each from where the last one ended."""
    policy = make_policy(PolicyConfig(dtype=options.dtype, remat=options.remat, attention=options.attention), shape)
    mesh, optimizer = make_mesh(-1, 1, 1), make_optimizer(OptimizerConfig(), total_steps=1)
    objective = ObjectiveConfig()
    limits = UpdateLimits(
        minibatches=1,
        rows=num_batch_shards(mesh),
        microbatch_tokens=options.microbatch_tokens,
        logit_chunk_tokens=options.chunk,
        temperature=1.0,
        max_new_tokens=options.response,
    )
    with use_mesh(mesh):
        params = init_parameters(policy, mesh, seed=0)
        states = [TrainState(params, init_optimizer(optimizer, params, mesh))]
        batch = shard_prompts(batch, mesh)

    def call() -> jax.Array:
        with use_mesh(mesh):
            state, metrics = update_policy(policy, optimizer, objective, limits, states.pop(), batch)
        states.append(state)
        return jax.block_until_ready((state, metrics))[1]["gradient/norm"]

    return call


def update_flops(options: argparse.Namespace, shape: ModelConfig, prompts_per_group: int) -> float:
    """FLOPs of a step that runs every prompt so many times: the trunk everywhere, the head where responses are predicted."""
    head = shape.vocab * shape.width
    prompt, response = options.context * prompts_per_group, options.response * options.samples
    pairs = prompts_per_group * options.context * (options.context + 1) // 2
    pairs += options.samples * (options.response * options.context + options.response * (options.response + 1) // 2)
    matrices = (shape.matmul_parameters - head) * (prompt + response) + head * response
    return options.prompts * (6.0 * matrices + 3.0 * attention_flops(shape, pairs))
