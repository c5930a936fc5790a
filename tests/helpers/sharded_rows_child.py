"""Attention over packed rows by the kernels on eight simulated devices: `python -m tests.helpers.sharded_rows_child`.

Prints as JSON, for each platform's kernels in interpret mode, the largest difference between the gradients on a mesh and on one
device. This is a separate process because the number of devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.model.attention.dispatch import KERNELS
from rpt_jax.model.attention.key_ranges import make_key_ranges
from rpt_jax.model.attention.packed import attend_packed
from tests.helpers.packed_rows import ATTEND, RowShape, make_example

SHAPE = RowShape(rows=4, kv_heads=2, heads=2, blocks=4, block=16, ranges=2, head_size=16, dtype="float32")
INTERPRETED = {"gpu_kernels": ATTEND["triton"], "tpu_kernels": ATTEND["mosaic"]}


def gradients(name: str) -> Any:
    """Return the gradients of queries, keys and values, computed under the current mesh."""
    example = make_example(SHAPE, 0)
    q, k, v, dout = (example.arrays[x][:, :, None] for x in ("q", "k", "v", "dout"))

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        key_ranges = make_key_ranges(jnp.asarray(example.begin_NxMxW), jnp.asarray(example.end_NxMxW), SHAPE.block)
        return jax.grad(lambda *x: jnp.sum(attend_packed(*x, key_ranges, name) * dout), argnums=(0, 1, 2))(q, k, v)

    return jax.device_get(run(q, k, v))


def main() -> None:
    """Compare a mesh of four by two devices with one device."""
    differences = {}
    for name, attend in INTERPRETED.items():
        KERNELS[name] = KERNELS[name]._replace(packed=KERNELS[name].packed._replace(attend=attend))
        alone = gradients(name)
        with use_mesh(make_mesh(data=4, fsdp=1, tensor=2)):
            sharded = gradients(name)
        assert all(np.abs(x).max() > 0.1 for x in alone), "the gradients test too little"
        differences[name] = max(float(np.abs(x - y).max()) for x, y in zip(alone, sharded, strict=True))
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
