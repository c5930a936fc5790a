"""Tokens a second of the policy: forward, forward and backward, prefill; and the share of the machine's matmul ceiling.

Forward and backward end in the mean log-probability of the next tokens, so they hold the head; prefill ends in the keys and
values of every token and the last token's state. The batch runs in passes of --microbatch sequences, as an update runs in rows.
FLOPs are those of the matrices and of causal attention, nothing recomputed counted. The ceiling is the fastest of as many runs
of one large matrix product. With --beside=transformers the same shape runs in PyTorch between our runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.bench.measure import interleaved, matmul_call
from rpt_jax.config import PolicyConfig
from rpt_jax.config.schema import ATTENTIONS, REMATS
from rpt_jax.describe import attention_flops
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.sharding import init_parameters
from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.objective.packing import fitting_divisor
from rpt_jax.setup import make_policy

_SHAPE = ModelConfig(layers=6, width=384, heads=6, kv_heads=2, head_size=64, ffn=1024, vocab=4096, qkv_bias=True)
_CACHED_TOKENS = 2048  # Of a pass on a CPU: with more, what a layer leaves for the next is no longer in the caches.
_SIZES = ("layers", "width", "heads", "kv_heads", "head_size", "ffn", "vocab")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """A preset, and sizes that differ from it."""
    parser.add_argument(
        "--preset", help="a name in model/model_config.py; default: 6 layers of width 384, vocabulary 4096"
    )
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"instead of the preset's {name}")


def chosen_shape(options: argparse.Namespace) -> ModelConfig:
    """The shape that `add_shape_options` asks for. Raises: UserError, for an unknown preset."""
    shape = preset(options.preset) if options.preset else _SHAPE
    return dataclasses.replace(shape, **{n: v for n in _SIZES if (v := getattr(options, n)) is not None})


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shape_options(parser)
    parser.add_argument("--batch", type=int, default=64, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument(
        "--microbatch", type=int, help="sequences of one pass; default: about 2,048 tokens on a CPU, else all of them"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--remat", choices=REMATS, default="dots")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens whose logits exist at one time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beside", choices=("transformers",), help="measure this one too, in turns")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where a choice does not run here."""
    shape = chosen_shape(options)
    policy = make_policy(PolicyConfig(dtype=options.dtype, remat=options.remat, attention=options.attention), shape)
    mesh = make_mesh(-1, 1, 1)
    with use_mesh(mesh):
        params = init_parameters(policy, mesh, seed=0)
        calls = policy_calls(policy, params, options.batch, options.length, _microbatch(options), options.chunk)
        if options.beside:
            from rpt_jax.bench.peer import transformers_calls

            calls |= transformers_calls(shape, options.batch, options.length, options.dtype)
        calls["ceiling"], ceiling_flops = matmul_call(options.dtype)
        seconds = interleaved(calls, options.repeats)
    ceiling = ceiling_flops / seconds["ceiling"].low
    tokens, rows = options.batch * options.length, []
    for name, s in seconds.items():
        flops = ceiling_flops if name == "ceiling" else _flops(name, shape, options.batch, options.length)
        rate = 0.0 if name == "ceiling" else tokens / s.median
        row = [name, s.median, s.low, s.high, rate, flops / s.median / 1e9, flops / s.median / ceiling]
        rows.append([row[0], *(float(f"{x:.4g}") for x in row[1:])])
    return ["program", "seconds", "fastest", "slowest", "tokens/s", "GFLOP/s", "of the ceiling"], rows


def _microbatch(options: argparse.Namespace) -> int:
    """Sequences of one pass. Raises: UserError, where they do not divide the batch."""
    if not options.microbatch:
        tokens = _CACHED_TOKENS if jax.default_backend() == "cpu" else options.batch * options.length
        return fitting_divisor(options.batch, tokens // options.length, 1)
    if options.batch % options.microbatch:
        raise UserError(f"--microbatch={options.microbatch} must divide --batch={options.batch}.")
    return options.microbatch


def policy_calls(
    policy: Transformer, params: Params, batch: int, length: int, microbatch: int, chunk: int
) -> dict[str, Callable[[], Any]]:
    """The three programs, on random tokens."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, policy.config.vocab, (batch // microbatch, microbatch, length + 1)), jnp.int32)
    lengths = jnp.full(microbatch, length, jnp.int32)

    def loss(params: Params, tokens_NxS: jax.Array) -> jax.Array:
        hidden, _, _ = prefill(policy, params, tokens_NxS[:, :-1], lengths)
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), tokens_NxS[:, 1:].reshape(-1)
        return -token_logprobs(head(policy, params), flat, targets, 1.0, chunk).mean()

    def add(params: Params, total: Any, tokens_NxS: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, tokens_NxS)), None

    @jax.jit
    def gradient(params: Params, tokens: jax.Array) -> Any:
        start = jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(functools.partial(add, params), start, tokens)[0]

    forward = jax.jit(lambda params, tokens: jax.lax.map(functools.partial(loss, params), tokens).mean())
    fill = jax.jit(
        lambda params, tokens: jax.lax.map(lambda some: prefill(policy, params, some[:, :-1], lengths)[1:], tokens)
    )
    return {
        "forward": lambda: forward(params, tokens),
        "forward and backward": lambda: gradient(params, tokens),
        "prefill": lambda: fill(params, tokens),
    }


def _flops(name: str, shape: ModelConfig, batch: int, length: int) -> float:
    head_flops = 2.0 * shape.vocab * shape.width * batch * length
    pairs = batch * length * (length + 1) // 2
    forward = 2.0 * shape.matmul_parameters * batch * length + attention_flops(shape, pairs)
    if "backward" in name:
        return 3 * forward
    return forward - head_flops if "prefill" in name else forward
