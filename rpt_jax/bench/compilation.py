"""Seconds to compile a forward and backward pass, by the number of layers.

The layers run in a loop, so the time should not grow with their number.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from rpt_jax.bench.options import add_compute_options, positive
from rpt_jax.config import PolicyConfig
from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.setup import make_policy

_LOGIT_CHUNK_TOKENS = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--depths", type=positive, nargs="+", default=[2, 48], help="numbers of layers")
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--batch", type=positive, default=8, help="sequences")
    parser.add_argument("--length", type=positive, default=256, help="tokens per sequence")
    add_compute_options(parser, remat="full", dtype=False)


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table.

    Raises:
      UserError: the attention is not available on this platform, or the width cannot be divided.
    """
    rows = []
    with _without_compilation_cache():
        _compile(options, layers=1)  # The first compilation of a process also loads the compiler.
        for layers in options.depths:
            tracing, compiling, size = _compile(options, layers)
            rows.append([layers, round(tracing, 2), round(compiling, 2), size])
    return ["layers", "seconds to trace and lower", "seconds to compile", "bytes of the lowered program"], rows


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Compile every program inside the block: one from the cache would not be compiled."""
    earlier = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX decides only once whether it uses the cache.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", earlier)
        reset_cache()


def _compile(options: argparse.Namespace, layers: int) -> tuple[float, float, int]:
    """Return the seconds to trace and lower, the seconds to compile, and the bytes of the lowered program."""
    width = options.width
    if width % 8:
        raise UserError(f"--width={width} must be a multiple of 8: four heads of an even size.", field="--width")
    config = ModelConfig(
        layers=layers, width=width, heads=4, kv_heads=2, head_size=width // 4, ffn=3 * width, vocab=1024
    )
    policy = make_policy(PolicyConfig(remat=options.remat, attention=options.attention), config)
    one = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), one, one)["params"]))
    tokens = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)

    def loss(policy: Transformer, params: Params, tokens_NxS: jax.Array) -> jax.Array:
        lengths_N = jnp.full(tokens_NxS.shape[0], tokens_NxS.shape[1], jnp.int32)
        hidden_MxD = prefill(policy, params, tokens_NxS, lengths_N)[0].reshape(-1, width)
        logprobs_M = token_logprobs(
            head(policy, params),
            hidden_MxD,
            tokens_NxS.reshape(-1),
            temperature=1.0,
            logit_chunk_tokens=_LOGIT_CHUNK_TOKENS,
        )
        return -logprobs_M.mean()

    start = time.perf_counter()
    gradient = in_policy_precision(jax.grad(loss, argnums=1))
    lowered = jax.jit(gradient, static_argnums=0).lower(policy, params, tokens)
    lowered_at = time.perf_counter()
    lowered.compile()
    return lowered_at - start, time.perf_counter() - lowered_at, len(lowered.as_text())
