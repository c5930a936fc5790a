"""Digests that tell whether something is bit for bit what it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.infra.digest import digest


def fingerprint_arrays(tree: Any) -> str:
    """A digest of every array's name, shape and bits, whatever mesh they lie on, in hexadecimal."""
    found, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_sums(tree)))
    names = {jax.tree_util.keystr(path): list(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return digest(names, [(jax.tree_util.keystr(path), int(value)) for path, value in found])


@jax.jit
def _sums(tree: Any) -> Any:
    def leaf(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        # Sums of integers do not depend on their order, and an odd factor loses no bit of what it multiplies.
        mixed = (bits ^ (bits >> 15)) * (place * jnp.uint32(0x9E3779B2) + jnp.uint32(1))
        return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

    return jax.tree.map(leaf, tree)
