"""Save or restore a checkpoint on a mesh: `python -m tests.helpers.checkpoint_child ACTION WORKDIR FSDP TENSOR`.

ACTION is "save", "restore" or "stop", which saves because of a stop signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.signals import StopSignals

action = sys.argv[1]
workdir = Path(sys.argv[2])
fsdp = int(sys.argv[3])
tensor = int(sys.argv[4])
sharding = NamedSharding(make_mesh(-1, fsdp, tensor), PartitionSpec("fsdp", "tensor"))
weights = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
state = {"weights": jax.device_put(weights * 0 if action == "restore" else weights, sharding)}
checkpoints = Checkpointer(workdir, 2, state)
if action == "save":
    checkpoints.stage(3, state, {"seen": 5})
    checkpoints.save()
elif action == "stop":
    signals = StopSignals()
    checkpoints.register_with(signals)
    checkpoints.stage(3, state, {"seen": 5})
    other = Checkpointer(workdir / "other", 2, state)  # Open, but not registered.
    other.stage(9, state, {})
    with signals.handle():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
else:
    checkpoint = checkpoints.restore()
    assert checkpoint is not None
    step, restored, run = checkpoint
    assert step == 3 and run == {"seen": 5} and restored["weights"].sharding == sharding
    np.testing.assert_array_equal(restored["weights"], weights)
checkpoints.close()
print(action, jax.device_count())
