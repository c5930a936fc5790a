"""Seconds that XLA takes to compile forward and backward, for policies that differ in depth alone.

Layers run in a loop, so the time does not grow with their number.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rpt_jax.config import PolicyConfig
from rpt_jax.config.schema import ATTENTIONS, REMATS
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params, head, prefill
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.setup import make_policy


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 48], help="numbers of layers")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--remat", choices=REMATS, default="full")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where a choice does not run here."""
    # A program fetched from the cache was not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    _compile(options, layers=1)  # The first compilation of a process also loads the compiler.
    rows = []
    for layers in options.depths:
        tracing, compiling, size = _compile(options, layers)
        rows.append([layers, round(tracing, 2), round(compiling, 2), size])
    return ["layers", "seconds to trace and lower", "seconds to compile", "bytes of the lowered program"], rows


def _compile(options: argparse.Namespace, layers: int) -> tuple[float, float, int]:
    w = options.width
    shape = ModelConfig(layers=layers, width=w, heads=4, kv_heads=2, head_size=w // 4, ffn=3 * w, vocab=1024)
    policy = make_policy(PolicyConfig(remat=options.remat, attention=options.attention), shape)
    one = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), one, one)["params"]))
    tokens = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        hidden = prefill(policy, params, tokens, lengths)[0].reshape(-1, w)
        return -token_logprobs(head(policy, params), hidden, tokens.reshape(-1), 1.0, 4096).mean()

    start = time.perf_counter()
    lowered = jax.jit(jax.grad(loss)).lower(params, tokens)
    between = time.perf_counter()
    lowered.compile()
    return between - start, time.perf_counter() - between, len(lowered.as_text())
