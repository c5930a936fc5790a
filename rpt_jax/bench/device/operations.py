"""The attention operations of prefill and of the update, with random arrays of a model's sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.bench.device.sizes import SAMPLES
from rpt_jax.model.attention.dispatch import KERNELS, Context, Kernel, KeyValues, attend, choose_attention
from rpt_jax.model.attention.key_ranges import KeyRanges
from rpt_jax.model.attention.packed import attend_packed
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.flops import causal_pairs
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.objective.packing import pack_groups


class Arrays(NamedTuple):
    """Queries, keys and values, the gradient of the output, which has the shape of the queries, and the ranges of packed rows."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    dout: jax.Array
    key_ranges: KeyRanges | None


class Operation(NamedTuple):
    """An attention operation on rows of tokens.

    Attributes:
      name: of the operation.
      rows, tokens: number and length of the rows.
      pairs: pairs of a query and a key that it attends to, per head.
      key_ranges: of packed rows. They are data: the compiler must not know how long its loops are.
      kernel: the kernel among those of a platform.
      attend: function of the name of an implementation, queries, keys, values and key ranges.
    """

    name: str
    rows: int
    tokens: int
    pairs: float
    key_ranges: KeyRanges | None
    kernel: Callable[[str], Kernel]
    attend: Callable[[str, jax.Array, jax.Array, jax.Array, Any], jax.Array]

    def implementations(self, dtype: str) -> list[str]:
        """Return the implementations that this platform has for a dtype, plain XLA first."""
        name = choose_attention("auto", target_platform())
        has_kernel = name in KERNELS and dtype in self.kernel(name).dtypes
        return ["blockwise", name] if has_kernel else ["blockwise"]

    def arrays(self, config: ModelConfig, dtype: str) -> Arrays:
        """Return random arrays for one layer of a model."""
        heads = (config.kv_heads, 1, config.heads // config.kv_heads)
        dims_q = (self.rows, *heads, self.tokens, config.head_size)
        dims_kv = (self.rows, *heads[:2], self.tokens, config.head_size)
        keys = jax.random.split(jax.random.key(0), 4)
        dims = (dims_q, dims_kv, dims_kv, dims_q)
        q, k, v, dout = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, dims, strict=True))
        return Arrays(q=q, k=k, v=v, dout=dout, key_ranges=self.key_ranges)

    def forward(self, implementation: str) -> Callable[[Arrays], jax.Array]:
        """Return the compiled function from the arrays to the output."""
        return jax.jit(lambda x: self.attend(implementation, x.q, x.k, x.v, x.key_ranges))

    def forward_and_backward(self, implementation: str) -> Callable[[Arrays], dict[str, jax.Array]]:
        """Return the compiled function from the arrays to the output and the gradients of queries, keys and values."""

        def run(x: Arrays) -> dict[str, jax.Array]:
            def attend_all(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return self.attend(implementation, q, k, v, x.key_ranges)

            out, pull_back = jax.vjp(attend_all, x.q, x.k, x.v)
            dq, dk, dv = pull_back(x.dout)
            return {"out": out, "dq": dq, "dk": dk, "dv": dv}

        return jax.jit(run)


def causal_attention(rows: int, tokens: int) -> Operation:
    """Return causal self-attention, as in prefill and pre-training."""

    def attend_causal(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: None) -> jax.Array:
        return attend(q, [Context(KeyValues(k=k, v=v))], implementation)

    return Operation(
        name=f"causal, {rows} x {tokens}",
        rows=rows,
        tokens=tokens,
        pairs=rows * causal_pairs(tokens),
        key_ranges=None,
        kernel=lambda name: KERNELS[name].causal,
        attend=attend_causal,
    )


def packed_attention(tokens: int, context: int) -> Operation:
    """Return attention over a row of an update, filled with prompts and responses of up to `context` tokens together."""
    key_ranges = packed_row(tokens, context)
    begin_NxMxW, end_NxMxW = key_ranges.begin_NxMxW, key_ranges.end_NxMxW

    def attend_row(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: KeyRanges) -> jax.Array:
        return attend_packed(q, k, v, key_ranges, implementation)

    return Operation(
        name=f"packed rows, context {context}",
        rows=1,
        tokens=begin_NxMxW.shape[2],
        pairs=float((end_NxMxW - begin_NxMxW).sum()),
        key_ranges=key_ranges,
        kernel=lambda name: KERNELS[name].packed,
        attend=attend_row,
    )


def packed_row(tokens: int, context: int) -> KeyRanges:
    """Pack groups of responses of different lengths, as an update does, and return the key ranges of the first row."""
    prompt = context // 2
    response = context - prompt
    groups = tokens // (prompt + SAMPLES * response // 2) + 2
    rng = np.random.default_rng(0)

    @jax.jit
    def pack() -> KeyRanges:
        packed = pack_groups(
            prompts_PxS=jnp.asarray(rng.integers(0, 1000, (groups, prompt)), jnp.int32),
            lengths_P=jnp.asarray(rng.integers(prompt // 2, prompt + 1, groups), jnp.int32),
            tokens_PxGxT=jnp.zeros((groups, SAMPLES, response), jnp.int32),
            response_lengths_PxG=jnp.asarray(rng.integers(1, response + 1, (groups, SAMPLES)), jnp.int32),
            window_P=jnp.arange(groups),
            used_P=jnp.ones(groups, bool),
            rows=1,
            microbatch_tokens=tokens,
        )
        return packed.rows(jnp.int32(0)).key_ranges

    return pack()
