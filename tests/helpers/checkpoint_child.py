"""Save or restore a checkpoint on a mesh: `python -m tests.helpers.checkpoint_child save|restore WORKDIR FSDP TENSOR`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.infra.checkpoint import Checkpointer

action = sys.argv[1]
workdir = Path(sys.argv[2])
fsdp = int(sys.argv[3])
tensor = int(sys.argv[4])
sharding = NamedSharding(make_mesh(-1, fsdp, tensor), PartitionSpec("fsdp", "tensor"))
weights = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
state = {"weights": jax.device_put(weights if action == "save" else weights * 0, sharding)}
checkpoints = Checkpointer(workdir, 2, state)
if action == "save":
    checkpoints.stage(3, state, {"seen": 5})
    checkpoints.save()
else:
    checkpoint = checkpoints.restore()
    assert checkpoint is not None
    step, restored, run = checkpoint
    assert step == 3 and run == {"seen": 5} and restored["weights"].sharding == sharding
    np.testing.assert_array_equal(restored["weights"], weights)
checkpoints.close()
print(action, jax.device_count())
