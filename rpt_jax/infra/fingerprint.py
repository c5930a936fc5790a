"""Checksums of JSON values and of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.infra.digest import digest


def fingerprint_arrays(tree: Any) -> str:
    """Return a checksum of the names, shapes and bits of all arrays in `tree`, in hexadecimal.

    It does not depend on how the arrays are sharded.
    """
    arrays, _ = jax.tree_util.tree_flatten_with_path(tree)
    shapes = {jax.tree_util.keystr(path): list(x.shape) for path, x in arrays}
    sums, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_sums(tree)))
    return digest(shapes, [(jax.tree_util.keystr(path), int(value)) for path, value in sums])


@jax.jit
def _sums(tree: Any) -> Any:
    """Return two uint32 sums per array: of its bits, and of its bits mixed with their positions."""

    def leaf(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        position = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        # Integer sums do not depend on their order, so any sharding gives the same result. The factor is odd, so that the product
        # loses no bit.
        mixed = (bits ^ (bits >> 15)) * (position * jnp.uint32(0x9E3779B2) + jnp.uint32(1))
        return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

    return jax.tree.map(leaf, tree)
