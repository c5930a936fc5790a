"""Compile attention over packed rows for a TPU: `python -m tests.helpers.tpu_rows_child TOPOLOGY SHAPE…`.

A shape is kv heads x query heads of each x tokens x head size x dtype. The last line of output is JSON: the number of kernels in
each compiled program, forward and backward.
"""

from __future__ import annotations

import json
import sys

from rpt_jax.preflight.topology import parse_topology, prepare_process


def main(topology_name: str, shapes: list[str]) -> None:
    """Compile and count."""
    topology = parse_topology(topology_name)
    prepare_process(topology)

    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from rpt_jax.model.attention.key_ranges import make_key_ranges
    from rpt_jax.model.attention.packed_mosaic import attend_mosaic
    from rpt_jax.preflight.report import devices

    mesh = Mesh(devices(topology)[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, begin: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
        key_ranges = make_key_ranges(begin, end)
        return jax.grad(lambda *x: attend_mosaic(*x, key_ranges).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    counts = {}
    for shape in shapes:
        *sizes, dtype = shape.split("x")
        kv_heads, heads, tokens, head_size = map(int, sizes)

        def array(*dims: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        queries = array(1, kv_heads, heads, tokens, head_size)
        keys = array(1, kv_heads, tokens, head_size)
        ranges = array(1, 3, tokens, dtype="int32")
        # Kernels know one or six bfloat16 products for one of float32 (model/precision.py).
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
            compiled = jax.jit(gradients).lower(queries, keys, keys, ranges, ranges).compile()
        counts[shape] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
