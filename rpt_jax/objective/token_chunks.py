"""Chunks of the tokens of a batch, whose large intermediate values, such as logits, exist for one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TokenChunks(NamedTuple):
    """Chunks of columns of N rows of W tokens.

    Devices that hold different rows, or different parts of them, work on every chunk.

    Attributes:
      rows: N.
      size: W; need not be a multiple of `width`, since the last chunk is padded with zeros.
      width: columns of a chunk.
    """

    rows: int
    size: int
    width: int

    @property
    def count(self) -> int:
        return -(-self.size // self.width)

    def split(self, tree: Any) -> Any:
        """Return arrays [count, N·width, …] from arrays [N, W, …]."""

        def split(x: jax.Array) -> jax.Array:
            padding = [(0, 0), (0, self.count * self.width - self.size)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, padding).reshape(self.rows, self.count, self.width, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0).reshape(self.count, self.rows * self.width, *x.shape[3:])

        return jax.tree.map(split, tree)

    def join(self, tree: Any) -> Any:
        """Return arrays [N, W, …] from arrays [count, N·width, …]."""

        def join(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x.reshape(self.count, self.rows, self.width, *x.shape[2:]), 0, 1)
            return x.reshape(self.rows, self.count * self.width, *x.shape[3:])[:, : self.size]

        return jax.tree.map(join, tree)

    def scan(
        self, fn: Callable[..., tuple[Any, Any]], total: Any, filled_N: jax.Array | None, inputs: Any, *, unroll: bool
    ) -> tuple[Any, Any]:
        """Apply `fn` to one chunk after another; return its last total, and its outputs, stacked.

        Args:
          fn: maps a total and the inputs of one chunk to the new total and to outputs.
          total: the initial total.
          filled_N: number of tokens at the start of each row that are needed, or None for all. Chunks without a needed
            token are skipped, and their outputs are zeros. A single chunk is never skipped.
          inputs: arrays [count, …].
          unroll: compile every chunk separately, so that outputs that are used chunk by chunk need not be stacked.
        """
        if filled_N is None or self.count == 1:
            return jax.lax.scan(fn, total, inputs, unroll=unroll)

        def step(total: Any, chunk: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            first, xs = chunk
            zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(fn, total, xs)[1])
            return jax.lax.cond(first < filled_N.max(), fn, lambda total, _: (total, zeros), total, xs)

        return jax.lax.scan(step, total, (jnp.arange(self.count) * self.width, inputs), unroll=unroll)
