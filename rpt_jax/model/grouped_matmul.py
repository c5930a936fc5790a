"""Grouped matrix product: each group of rows is multiplied by its own matrix.

TPUs have an instruction for it, `jax.lax.ragged_dot`. What JAX lowers that to on CPUs, and XLA may on GPUs, multiplies every row
with every matrix and masks the results. There, each group is padded to whole blocks of rows instead. The number of blocks, and so
of turns of the loop over them, is known at compile time, whatever the sizes of the groups are.

Letters in shape suffixes: E groups, S rows, I inputs, O outputs, T turns, C blocks of a turn, R rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.platform import target_platform

# How many rows can be multiplied with a matrix while a copy of it is made, by platform. That of CPUs is measured
# (docs/guides/experts.md). That of GPUs is arithmetic: at its peak, an H100 computes 300 FLOPs in the time of a byte.
_ROWS_PER_COPY = {"cpu": 16, "gpu": 256}
# Blocks that are multiplied at once, each with a copy of its matrix.
_BLOCKS_PER_TURN = 16


def grouped_matmul(rows_SxI: jax.Array, matrices_ExIxO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiply the first `sizes_E[0]` rows with the first matrix, the next `sizes_E[1]` rows with the second, and so on.

    Args:
      rows_SxI: sorted by the matrix that they are multiplied with.
      matrices_ExIxO: in the dtype of the rows.
      sizes_E: int32 number of rows of each matrix; rows after the last group have undefined results and gradients.

    Returns: [S, O] in the dtype of the rows.
    """
    if target_platform() == "tpu":
        return jax.lax.ragged_dot(rows_SxI, matrices_ExIxO, sizes_E)
    return _multiply_groups(rows_SxI, matrices_ExIxO, sizes_E)


def block_size(rows: int, groups: int) -> int:
    """Return the rows of a block with which products should take the least time, a power of two."""
    copy = _ROWS_PER_COPY[target_platform()]
    sizes = [2**power for power in range(rows.bit_length())]
    return min(sizes, key=lambda size: block_count(rows, groups, size) * (size + copy))


def block_count(rows: int, groups: int, size: int) -> int:
    """Return how many blocks of `size` rows suffice for any sizes of the groups."""
    return (rows + min(rows, groups) * (size - 1)) // size


class _Blocks(NamedTuple):
    """The blocks of a grouped product, or those of a turn, without T. Blocks that no group needs consist of padding.

    Attributes:
      group_TxC: int32 number of their group.
      row_TxCxR: int32 index of their rows.
      is_padding_TxCxR: bool, True where the index is past the end of the group.
    """

    group_TxC: jax.Array
    row_TxCxR: jax.Array
    is_padding_TxCxR: jax.Array


def _make_blocks(rows: int, sizes_E: jax.Array) -> tuple[_Blocks, jax.Array]:
    """Divide the groups into blocks, and return these and the index of each row among all rows of the blocks, int32 [S]."""
    groups = len(sizes_E)
    size = block_size(rows, groups)
    blocks = block_count(rows, groups, size)
    turns = -(-blocks // _BLOCKS_PER_TURN)
    per_turn = -(-blocks // turns)

    row_end_E = jnp.cumsum(sizes_E)
    block_counts_E = -(-sizes_E // size)
    block_end_E = jnp.cumsum(block_counts_E)
    # How much padding is before the rows of a group.
    padding_E = size * (block_end_E - block_counts_E) - (row_end_E - sizes_E)

    def group_of(index: jax.Array, end_E: jax.Array) -> jax.Array:
        # By comparing with all ends, since a binary search is a loop, which a GPU takes longer for.
        return jnp.minimum(jnp.searchsorted(end_E, index, side="right", method="compare_all"), groups - 1)

    block_TxC = jnp.arange(turns * per_turn, dtype=jnp.int32).reshape(turns, per_turn)
    group_TxC = group_of(block_TxC, block_end_E)
    row_TxCxR = (size * block_TxC - padding_E[group_TxC])[..., None] + jnp.arange(size, dtype=jnp.int32)
    is_padding_TxCxR = row_TxCxR >= row_end_E[group_TxC][..., None]
    row_S = jnp.arange(rows, dtype=jnp.int32)
    place_S = row_S + padding_E[group_of(row_S, row_end_E)]
    return _Blocks(group_TxC=group_TxC, row_TxCxR=row_TxCxR, is_padding_TxCxR=is_padding_TxCxR), place_S


def _multiply_blocks(spec: str, rows_SxI: jax.Array, matrices_ExIxO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Return the rows of each group multiplied with its matrix or, by `spec`, with the transposed matrix."""
    blocks, place_S = _make_blocks(len(rows_SxI), sizes_E)

    def multiply_turn(_: None, turn: _Blocks) -> tuple[None, jax.Array]:
        rows_CxRxI = rows_SxI.at[turn.row_TxCxR].get(mode="clip")
        return None, jnp.einsum(spec, rows_CxRxI, matrices_ExIxO[turn.group_TxC])

    _, products_TxCxRxO = jax.lax.scan(multiply_turn, None, blocks)
    # The places of rows after the last group may be after the last block.
    return products_TxCxRxO.reshape(-1, products_TxCxRxO.shape[-1]).at[place_S].get(mode="clip")


@jax.custom_vjp
def _multiply_groups(rows_SxI: jax.Array, matrices_ExIxO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Compute `grouped_matmul` by blocks."""
    return _multiply_blocks("cri,cio->cro", rows_SxI, matrices_ExIxO, sizes_E)


def _multiply_groups_forward(
    rows_SxI: jax.Array, matrices_ExIxO: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _multiply_groups(rows_SxI, matrices_ExIxO, sizes_E), (rows_SxI, matrices_ExIxO, sizes_E)


def _multiply_groups_backward(
    inputs: tuple[jax.Array, jax.Array, jax.Array], gradient_SxO: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_SxI, matrices_ExIxO, sizes_E = inputs
    blocks, _ = _make_blocks(len(rows_SxI), sizes_E)

    def add_turn(total_ExIxO: jax.Array, turn: _Blocks) -> tuple[jax.Array, None]:
        is_padding_CxRx1 = turn.is_padding_TxCxR[..., None]
        rows_CxRxI = jnp.where(is_padding_CxRx1, 0, rows_SxI.at[turn.row_TxCxR].get(mode="clip"))
        gradient_CxRxO = jnp.where(is_padding_CxRx1, 0, gradient_SxO.at[turn.row_TxCxR].get(mode="clip"))
        products_CxIxO = jnp.einsum("cri,cro->cio", rows_CxRxI, gradient_CxRxO, preferred_element_type=jnp.float32)
        # One after the other, since several blocks may belong to a group: a scatter would add them in any order.
        for group, product_IxO in zip(turn.group_TxC, products_CxIxO, strict=True):
            total_ExIxO = jax.lax.dynamic_update_index_in_dim(
                total_ExIxO, total_ExIxO[group] + product_IxO, group, axis=0
            )
        return total_ExIxO, None

    zeros_ExIxO = jnp.zeros(matrices_ExIxO.shape, jnp.float32)
    total_ExIxO, _ = jax.lax.scan(add_turn, zeros_ExIxO, blocks)
    rows_gradient_SxI = _multiply_blocks("cro,cio->cri", gradient_SxO, matrices_ExIxO, sizes_E)
    return rows_gradient_SxI, total_ExIxO.astype(matrices_ExIxO.dtype), None


_multiply_groups.defvjp(_multiply_groups_forward, _multiply_groups_backward)
