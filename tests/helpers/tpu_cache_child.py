"""Compile attention of a decode step over KV caches for a TPU: `python -m tests.helpers.tpu_cache_child TOPOLOGY SHAPE…`.

A shape is layers x slots x kv heads x query heads per kv head x head size x blocks x keys per block of the rollouts' own tokens x
rows x width x blocks x keys per block of a cache that they share x dtype. The last line of output is JSON: the number of kernels
in each compiled program.
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
    from jax.sharding import NamedSharding, PartitionSpec

    from rpt_jax.distributed.mesh import make_mesh
    from rpt_jax.model.attention.blocked_cache import BlockedCache
    from rpt_jax.model.attention.dispatch import KERNELS, KeyValues
    from rpt_jax.preflight.report import devices
    from rpt_jax.rollout.kv_cache import SharedCache, cached_attention, shared_reads

    kernel = KERNELS["tpu_kernels"].cache
    mesh = make_mesh(1, 1, 1, devices=devices(topology)[:1])
    sharding = NamedSharding(mesh, PartitionSpec())

    def attend(
        q: jax.Array,
        new: KeyValues,
        own: BlockedCache,
        counts: jax.Array,
        shared: BlockedCache,
        end: jax.Array,
        slots: jax.Array,
        layer: jax.Array,
    ) -> jax.Array:
        heads_per_kv = q.shape[3]
        cache = SharedCache(blocks=shared, end_NxW=end, index_R=jnp.arange(end.size))
        reads = shared_reads(cache, slots, heads_per_kv, kernel)
        return cached_attention((reads,), own, counts.max(), counts, heads_per_kv, kernel)(layer, q, new)

    counts = {}
    for shape in shapes:
        *sizes, dtype = shape.split("x")
        layers, slots, kv_heads, heads_per_kv, head_size, blocks, block, rows, width, shared_blocks, shared_block = map(
            int, sizes
        )

        def array(*dims: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        def cache(
            blocks: int, rows: int, block: int, array=array, layers=layers, heads=kv_heads, c=head_size
        ) -> BlockedCache:
            keys = array(layers, blocks, rows, heads, block, 2 * c)
            return BlockedCache(k=keys, v=None, order="joined")  # type: ignore[arg-type]

        new = array(slots, kv_heads, 1, 1, head_size)
        arguments = (
            array(slots, kv_heads, 1, heads_per_kv, 1, head_size),
            KeyValues(new, new),  # type: ignore[arg-type]
            cache(blocks, slots, block),
            array(slots, dtype="int32"),
            cache(shared_blocks, rows, shared_block),
            array(rows, width, dtype="int32"),
            array(slots, dtype="int32"),
            array(dtype="int32"),
        )
        # Kernels know one or six bfloat16 products for one of float32 (model/precision.py).
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
            compiled = jax.jit(attend).lower(*arguments).compile()
        counts[shape] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
