"""Compile splash attention and its gradients for a TPU: `python -m tests.helpers.tpu_splash_child TOPOLOGY SHAPE…`.

A shape is heads per kv head x tokens x head size x dtype. The last line of output is JSON: the number of kernels in each compiled
program.
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

    from rpt_jax.model.attention.kernels import attend_splash
    from rpt_jax.preflight.report import devices

    mesh = Mesh(devices(topology)[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_splash(q, k, v).astype("float32").sum()

    counts = {}
    for shape in shapes:
        *sizes, dtype = shape.split("x")
        heads, tokens, head_size = map(int, sizes)
        queries = jax.ShapeDtypeStruct((2, 1, 1, heads, tokens, head_size), dtype, sharding=sharding)
        keys = jax.ShapeDtypeStruct((2, 1, 1, tokens, head_size), dtype, sharding=sharding)
        # Kernels know one or six bfloat16 products for one of float32 (model/precision.py).
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if dtype == "float32" else None):
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(queries, keys, keys).compile()
        counts[shape] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
