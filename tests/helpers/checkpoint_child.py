"""Saves or restores a checkpoint on a mesh of as many devices as the arguments say; prints what it holds."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.infra.checkpoint import Checkpointer

what, workdir, fsdp, tensor = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sharding = NamedSharding(make_mesh(-1, fsdp, tensor), PartitionSpec("fsdp", "tensor"))
weights = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
state = {"weights": jax.device_put(weights if what == "save" else weights * 0, sharding)}
checkpoints = Checkpointer(workdir, 2, state)
if what == "save":
    checkpoints.hold(3, state, {"seen": 5})
    checkpoints.save()
else:
    step, restored, run = checkpoints.restore()
    assert step == 3 and run == {"seen": 5} and restored["weights"].sharding == sharding
    np.testing.assert_array_equal(restored["weights"], weights)
checkpoints.close()
print(what, jax.device_count())
