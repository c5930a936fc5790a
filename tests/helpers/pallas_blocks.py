"""What a Pallas kernel for a TPU copies, by its block specs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def copied_bytes(kernel: Any, grid: Iterable[Iterable[int]], scalars: Sequence[jax.Array]) -> float:
    """Return the bytes that a kernel call copies: a block whenever its index changes, with full rows of 128 lanes.

    Args:
      kernel: the `pallas_call` equation.
      grid: the steps of each axis of the grid.
      scalars: the scalars that are prefetched.
    """
    steps_SxG = jnp.array(list(itertools.product(*grid)))
    total = 0
    for block in kernel.params["grid_mapping"].block_mappings:
        starts = jax.vmap(lambda step, block=block: block.compute_start_indices_interpret(step, *scalars))
        starts_SxD = np.stack(jnp.broadcast_arrays(*starts(steps_SxG)), axis=-1)
        copies = 1 + np.count_nonzero((np.diff(starts_SxD, axis=0) != 0).any(axis=1))
        *outer, last = block.block_aval.shape
        total += copies * block.block_aval.dtype.itemsize * math.prod(outer) * math.ceil(last / 128) * 128
    return total
