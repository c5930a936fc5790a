"""Tokens per second of the policy: forward, forward and backward, and prefill, with the fraction of the machine's peak.

Forward and backward end in the mean log-probability of the next tokens, so they include the head. Prefill ends in the
keys and values of every token and the hidden state of the last one. The batch runs in passes of --microbatch
sequences, as an update runs in rows. FLOPs count the matrices and causal attention, without recomputation. The peak
is the fastest of the runs of one large matrix product. With --compare=transformers the same model runs in PyTorch
between these runs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.sharding import init_parameters
from rpt_jax.errors import UserError
from rpt_jax.model.flops import attention_flops
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.objective.packing import fitting_divisor
from rpt_jax.setup import make_policy

# Tokens per pass on a CPU: with more, the activations between layers no longer fit its caches.
_CPU_PASS_TOKENS = 2048
_PEAK = "peak matmul"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    add_model_options(parser)
    parser.add_argument("--batch", type=positive, default=64, help="sequences")
    parser.add_argument("--length", type=positive, default=256, help="tokens per sequence")
    parser.add_argument(
        "--microbatch", type=positive, help="sequences per pass; default: about 2,048 tokens on a CPU, else all of them"
    )
    add_compute_options(parser, remat="dots")
    add_logit_chunk_option(parser)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--compare", choices=("transformers",), help="baseline to measure in the same run")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table.

    Raises:
      UserError: an option is invalid or not available on this platform.
    """
    # The programs, and the product that measures the peak.
    config = chosen_model(options)
    policy = make_policy(policy_config(options), config)
    mesh = make_mesh(-1, 1, 1)
    with use_mesh(mesh):
        calls = policy_calls(
            policy,
            init_parameters(policy, mesh, seed=0),
            batch=options.batch,
            length=options.length,
            microbatch=_microbatch(options),
            logit_chunk_tokens=options.logit_chunk_tokens,
        )
        if options.compare:
            from rpt_jax.bench.peer import transformers_calls

            calls |= transformers_calls(config, options.batch, options.length, options.dtype)
        calls[_PEAK], peak_flops = matmul_call(options.dtype)
        seconds = interleaved(calls, options.repeats)

    # Tokens and FLOPs per second.
    peak = peak_flops / seconds[_PEAK].fastest
    tokens = options.batch * options.length
    flops = program_flops(config, options.batch, options.length) | {_PEAK: peak_flops}
    rows = []
    for name, s in seconds.items():
        tokens_per_second = 0.0 if name == _PEAK else tokens / s.median
        flops_per_second = flops[name] / s.median
        figures = [s.median, s.fastest, s.slowest, tokens_per_second, flops_per_second / 1e9, flops_per_second / peak]
        rows.append([name, *map(round_to_4_digits, figures)])
    return ["program", "seconds", "fastest", "slowest", "tokens/s", "GFLOP/s", "fraction of peak"], rows


def policy_calls(
    policy: Transformer, params: Params, *, batch: int, length: int, microbatch: int, logit_chunk_tokens: int
) -> dict[str, Callable[[], Any]]:
    """Return a call of each of the three programs, on random tokens.

    Args:
      policy: the policy.
      params: its parameters.
      batch: sequences.
      length: tokens per sequence.
      microbatch: sequences per pass; divides `batch`.
      logit_chunk_tokens: tokens whose logits exist at once.
    """
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, policy.config.vocab, (batch // microbatch, microbatch, length + 1)), jnp.int32)
    lengths_N = jnp.full(microbatch, length, jnp.int32)

    def loss(params: Params, tokens_NxS: jax.Array) -> jax.Array:
        hidden, _, _ = prefill(policy, params, tokens_NxS[:, :-1], lengths_N)
        hidden_MxD = hidden.reshape(-1, hidden.shape[-1])
        targets_M = tokens_NxS[:, 1:].reshape(-1)
        return -token_logprobs(head(policy, params), hidden_MxD, targets_M, 1.0, logit_chunk_tokens).mean()

    def add_gradient(params: Params, total: Any, tokens_NxS: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, tokens_NxS)), None

    def compiled(program: Callable[..., Any]) -> Callable[[], Any]:
        run = jax.jit(in_policy_precision(program), static_argnums=0)
        return lambda: run(policy, params, tokens)

    def forward(_: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
        return jax.lax.map(functools.partial(loss, params), tokens).mean()

    def forward_and_backward(_: Transformer, params: Params, tokens: jax.Array) -> Any:
        zeros = jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(functools.partial(add_gradient, params), zeros, tokens)[0]

    def prefill_all(_: Transformer, params: Params, tokens: jax.Array) -> Any:
        return jax.lax.map(lambda tokens_NxS: prefill(policy, params, tokens_NxS[:, :-1], lengths_N)[1:], tokens)

    return {
        "forward": compiled(forward),
        "forward and backward": compiled(forward_and_backward),
        "prefill": compiled(prefill_all),
    }


def _microbatch(options: argparse.Namespace) -> int:
    """Return the sequences per pass. Raises UserError if they do not divide the batch."""
    if not options.microbatch:
        tokens = _CPU_PASS_TOKENS if jax.default_backend() == "cpu" else options.batch * options.length
        return fitting_divisor(options.batch, tokens // options.length, 1)
    if options.batch % options.microbatch:
        raise UserError(f"--microbatch={options.microbatch} must divide --batch={options.batch}.", field="--microbatch")
    return options.microbatch


def program_flops(config: ModelConfig, batch: int, length: int) -> dict[str, float]:
    """Return the FLOPs of each program that `policy_calls` and `transformers_calls` return, by its name."""
    head_flops = 2.0 * config.vocab * config.width * batch * length
    pairs = batch * length * (length + 1) // 2
    forward = 2.0 * config.matmul_parameters * batch * length + attention_flops(config, pairs)
    return {
        "forward": forward,
        "forward and backward": 3 * forward,
        "prefill": forward - head_flops,
        "transformers: forward": forward,
        "transformers: forward and backward": 3 * forward,
    }
