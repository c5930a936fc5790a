"""Which keys of its row each token of packed rows attends to, and the pairs of blocks between which there is attention.

Letters in shape suffixes: N rows of W tokens, each of B blocks of b tokens (W = B·b), M ranges per token, T = B·B pairs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.platform import target_platform

# Queries and keys per block of a row, by platform. On CPUs, blocks that fit in a core's cache are fastest; a visit of the TPU
# kernels needs a larger matrix product than one of the GPU kernels to outweigh its overhead.
ROW_BLOCK_SIZES = {"cpu": 64, "gpu": 64, "tpu": 512}
# The tokens of a row are a multiple of the first of these that is less, by platform: of whole blocks and, on CPUs, whole panels.
_ROW_MULTIPLES = {"cpu": (512, 64), "gpu": (64,), "tpu": (512,)}
# A row shorter than a block is one block. The kernels need whole tiles of a TPU's registers, or of a GPU's tensor cores.
_SHORT_ROW_MULTIPLES = {"cpu": 1, "gpu": 64, "tpu": 128}
# Queries per panel, by platform: how many query tokens of each row plain XLA processes at a time.
QUERY_PANEL_SIZES = {"cpu": 512, "gpu": 4096, "tpu": 4096}


class BlockPairs(NamedTuple):
    """Pairs of blocks between which there is attention, in the order in which a kernel visits them.

    A kernel adds up the results of one block, its own, over all of the other blocks before it begins with the next block.

    Attributes:
      own_NxT: int32, the block whose results a visit adds to, ascending.
      other_NxT: int32, the block that it is compared with.
      first_NxB: int32, the first visit of each block.
      counts_NxB: int32, with how many blocks each block is compared. A block without any is visited once, to set its results
        to zero.
      visits_N: int32, number of visits; the entries after them are undefined.
    """

    own_NxT: jax.Array
    other_NxT: jax.Array
    first_NxB: jax.Array
    counts_NxB: jax.Array
    visits_N: jax.Array


class KeyRanges(NamedTuple):
    """Which keys of its row each token attends to; the same in every layer.

    Attributes:
      begin_NxMxW, end_NxMxW: int32, M ranges of keys per token, from `begin` up to, but not including, `end`. Each token must
        attend to at least one key.
      blocks_NxBxB: int32, for each query block all key blocks, those that it attends to first.
      counts_NxB: int32, for each query block the number of key blocks that it attends to.
      by_query: for each query block, the key blocks that it attends to.
      by_key: for each key block, the query blocks that attend to it.
    """

    begin_NxMxW: jax.Array
    end_NxMxW: jax.Array
    blocks_NxBxB: jax.Array
    counts_NxB: jax.Array
    by_query: BlockPairs
    by_key: BlockPairs


def row_size(tokens: int, platform: str | None = None) -> int:
    """Return `tokens` rounded up to whole blocks and, on a CPU, to whole query panels if a row is longer than a panel.

    Args:
      tokens: tokens that a row has to hold.
      platform: "cpu", "gpu" or "tpu"; None for the target platform.
    """
    platform = platform or target_platform()
    multiple = next((size for size in _ROW_MULTIPLES[platform] if tokens > size), _SHORT_ROW_MULTIPLES[platform])
    return -(-tokens // multiple) * multiple


def make_key_ranges(begin_NxMxW: jax.Array, end_NxMxW: jax.Array, block: int | None = None) -> KeyRanges:
    """Find the pairs of blocks between which there is attention.

    Args:
      begin_NxMxW, end_NxMxW: int32, as in `KeyRanges`.
      block: tokens per block; None for the platform's default. A block smaller than W must divide W.
    """
    n, _, size = begin_NxMxW.shape
    block = min(block or ROW_BLOCK_SIZES[target_platform()], size)
    starts_B = jnp.arange(0, size, block, dtype=jnp.int32)

    def overlaps(begin_NxW: jax.Array, end_NxW: jax.Array) -> jax.Array:
        """Return whether any token of a query block has a range that overlaps a key block, bool [N, B, B]."""
        begin_NxWx1, end_NxWx1 = begin_NxW[..., None], end_NxW[..., None]
        overlap_NxWxB = jnp.maximum(begin_NxWx1, starts_B) < jnp.minimum(end_NxWx1, starts_B + block)
        return overlap_NxWxB.reshape(n, -1, block, len(starts_B)).any(axis=2)

    # One range at a time, because all of them together would take M times the memory.
    per_range = [overlaps(begin_NxMxW[:, m], end_NxMxW[:, m]) for m in range(begin_NxMxW.shape[1])]
    attended_NxBxB = functools.reduce(jnp.logical_or, per_range)
    return KeyRanges(
        begin_NxMxW=begin_NxMxW,
        end_NxMxW=end_NxMxW,
        blocks_NxBxB=jnp.argsort(~attended_NxBxB, axis=-1, stable=True).astype(jnp.int32),
        counts_NxB=attended_NxBxB.sum(axis=-1, dtype=jnp.int32),
        by_query=_block_pairs(attended_NxBxB),
        by_key=_block_pairs(attended_NxBxB.transpose(0, 2, 1)),
    )


def _block_pairs(paired_NxBxB: jax.Array) -> BlockPairs:
    """List the pairs of blocks [own, other] that are True in `paired_NxBxB`."""
    n, num_blocks, _ = paired_NxBxB.shape
    counts_NxB = paired_NxBxB.sum(axis=-1, dtype=jnp.int32)
    # A block that is paired with none visits the first one.
    visited_NxBxB = paired_NxBxB | ((counts_NxB == 0)[..., None] & (jnp.arange(num_blocks) == 0))
    order_NxT = jnp.argsort(~visited_NxBxB.reshape(n, -1), axis=-1, stable=True).astype(jnp.int32)
    ends_NxB = jnp.cumsum(jnp.maximum(counts_NxB, 1), axis=-1, dtype=jnp.int32)
    return BlockPairs(
        own_NxT=order_NxT // num_blocks,
        other_NxT=order_NxT % num_blocks,
        first_NxB=ends_NxB - jnp.maximum(counts_NxB, 1),
        counts_NxB=counts_NxB,
        visits_N=ends_NxB[:, -1],
    )
