"""Random packed rows, and attention over them by the kernels in interpret mode against the plain reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.model.attention.key_ranges import make_key_ranges
from rpt_jax.model.attention.packed import attend_all_keys
from rpt_jax.model.attention.packed_mosaic import attend_mosaic
from rpt_jax.model.attention.packed_triton import attend_triton

ATTEND = {
    "reference": attend_all_keys,
    "mosaic": functools.partial(attend_mosaic, interpret=True),
    "triton": functools.partial(attend_triton, interpret=True),
}
# Of results in units of the largest one; bfloat16 rounds weights and results to 8 bits. Gradients of queries and keys
# differ more, because rowsum(dO * O) takes the rounded output, as in FlashAttention-2: 2 % where it would be 0.6 %.
TOLERANCES = {
    "float32": dict.fromkeys(("out", "dq", "dk", "dv"), 2e-5),
    "bfloat16": {"out": 1e-2, "dq": 5e-2, "dk": 5e-2, "dv": 1e-2},
}


class RowShape(NamedTuple):
    """Sizes of an example: `rows` rows of `blocks` blocks of `block` tokens, with `ranges` key ranges for each token."""

    rows: int
    kv_heads: int
    heads: int
    blocks: int
    block: int
    ranges: int
    head_size: int
    dtype: str

    @property
    def size(self) -> int:
        return self.blocks * self.block


class Example(NamedTuple):
    """Scaled queries, keys, values and the gradient of the output, key ranges, and which tokens are not padding."""

    arrays: dict[str, np.ndarray]
    begin_NxMxW: np.ndarray
    end_NxMxW: np.ndarray
    real_NxW: np.ndarray


def make_example(shape: RowShape, seed: int) -> Example:
    """Draw a row that is filled from both ends, with padding between: padding attends to nothing, and nothing to it.

    A range of a token is empty, or anywhere within one of the two ends; some of them overlap or end at a block's boundary.
    """
    rng = np.random.default_rng(seed)
    n, m, size = shape.rows, shape.ranges, shape.size
    left_N = rng.integers(1, size + 1, n)
    right_N = np.array([rng.integers(left, size + 1) for left in left_N])
    index_W = np.arange(size)
    real_NxW = (index_W < left_N[:, None]) | (index_W >= right_N[:, None])

    # Ranges in the first end, or in the second one if there is any.
    in_left = (rng.random((n, m, size)) < 0.5) | (right_N == size)[:, None, None]
    low = np.where(in_left, 0, right_N[:, None, None])
    high = np.where(in_left, left_N[:, None, None], size)
    begin = rng.integers(low, high)
    end = np.minimum(begin + rng.integers(0, rng.integers(1, size + 1) + 1, begin.shape), high)
    boundary = np.minimum(-(-end // shape.block) * shape.block, high)
    end = np.where(rng.random(begin.shape) < 0.3, boundary, end)
    # Every real token attends to something.
    end[:, -1] = np.maximum(end[:, -1], begin[:, -1] + 1)
    begin, end = (np.where(real_NxW[:, None], x, 0).astype(np.int32) for x in (begin, end))

    queries = (n, shape.kv_heads, shape.heads, size, shape.head_size)
    keys = (n, shape.kv_heads, size, shape.head_size)
    dims = {"q": queries, "k": keys, "v": keys, "dout": queries}
    arrays = {name: rng.standard_normal(x).astype(np.float32) for name, x in dims.items()}
    return Example(arrays=arrays, begin_NxMxW=begin, end_NxMxW=end, real_NxW=real_NxW)


@functools.cache
def attention(name: str, shape: RowShape, dtype: str) -> Callable[..., dict[str, jax.Array]]:
    """Return the compiled function from the arrays of an example and its ranges to the output and the gradients."""

    def run(arrays: dict[str, jax.Array], begin: jax.Array, end: jax.Array) -> dict[str, Any]:
        key_ranges = make_key_ranges(begin, end, shape.block)
        q, k, v, dout = (arrays[name].astype(dtype) for name in ("q", "k", "v", "dout"))
        out, gradients = jax.vjp(lambda q, k, v: ATTEND[name](q, k, v, key_ranges), q, k, v)
        dq, dk, dv = gradients(dout)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    return jax.jit(run)


def check_kernels(name: str, shape: RowShape, seed: int) -> None:
    """Assert that outputs and gradients equal the reference's, and are zero at padding, whatever numbers are there."""
    example = make_example(shape, seed)
    ranges = example.begin_NxMxW, example.end_NxMxW
    rounded = {name: np.asarray(jnp.asarray(x, shape.dtype), np.float32) for name, x in example.arrays.items()}

    def at_padding(number_NxW: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays with these numbers at padding."""
        changed = {}
        for name, x in rounded.items():
            real, number = (
                np.expand_dims(y, (1, 2) if x.ndim == 5 else 1)[..., None] for y in (example.real_NxW, number_NxW)
            )
            changed[name] = np.where(real, x, number).astype(np.float32)
        return changed

    expected = attention("reference", shape, "float32")(at_padding(np.zeros(example.real_NxW.shape)), *ranges)
    # Blocks that hold nothing but padding are not even read.
    skipped_NxB = ~example.real_NxW.reshape(shape.rows, shape.blocks, shape.block).any(-1)
    poison_NxW = np.where(np.repeat(skipped_NxB, shape.block, axis=1), np.nan, 1e4)
    ours = attention(name, shape, shape.dtype)(at_padding(poison_NxW), *ranges)

    for result, theirs in expected.items():
        assert ours[result].dtype == jnp.dtype(shape.dtype)
        x, y = (np.moveaxis(np.asarray(z, np.float32), -2, 1) for z in (ours[result], theirs))
        assert not x[~example.real_NxW].any(), f"{result} at padding"
        # The reference spreads the weights of padding over all keys; its gradient there is zero.
        y = np.where(np.expand_dims(example.real_NxW, tuple(range(2, y.ndim))), y, 0)
        tolerance = TOLERANCES[shape.dtype][result] * max(1, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=result)
