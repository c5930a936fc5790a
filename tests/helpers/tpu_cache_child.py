"""Compile attention over a KV cache for a TPU: `python -m tests.helpers.tpu_cache_child TOPOLOGY SHAPE…`.

A shape is layers x blocks x rows x kv heads x keys per block x head size x queries x dtype. The last line of output is JSON: the
number of kernels in each compiled program.
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
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from rpt_jax.model.attention.blocked_cache import BlockedCache, CacheSizes, PartialSoftmax, make_cache_ranges
    from rpt_jax.model.attention.dispatch import KERNELS
    from rpt_jax.preflight.report import devices

    kernel = KERNELS["tpu_kernels"].cache
    mesh = Mesh(devices(topology)[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def attend(
        q: jax.Array, cache: BlockedCache, begin: jax.Array, length: jax.Array, layer: jax.Array
    ) -> PartialSoftmax:
        _, kv_heads, num_queries, head_size = q.shape
        sizes = CacheSizes(num_queries, cache.block_size, kv_heads, head_size, q.dtype.itemsize)
        return kernel.attend(q, cache, layer, make_cache_ranges(begin, length, cache, kernel.max_group_rows(sizes)))

    counts = {}
    for shape in shapes:
        *sizes, dtype = shape.split("x")
        layers, blocks, rows, kv_heads, block, head_size, queries = map(int, sizes)

        def array(*dims: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        keys = array(layers, blocks, rows, kv_heads, block, 2 * head_size)
        cache = BlockedCache(k=keys, v=None, order="joined")  # type: ignore[arg-type]
        arguments = (
            array(rows, kv_heads, queries, head_size),
            cache,
            array(rows, dtype="int32"),
            array(rows, queries, dtype="int32"),
            array(dtype="int32"),
        )
        # Kernels know one or six bfloat16 products for one of float32 (model/precision.py).
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
            compiled = jax.jit(attend).lower(*arguments).compile()
        counts[shape] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
