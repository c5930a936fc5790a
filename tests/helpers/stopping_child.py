"""A process inside XLA for a long time, as during a compilation or a rollout.

`python -m tests.helpers.stopping_child ACTION GRACE_SECONDS`, where ACTION is what saving does: "works", "fails" or "hangs"; with
"kept", there is nothing to save, and with "uploads", what is saved cannot be uploaded. With the others, a background thread fails
instead: "writes" at a full disk, "own" in this package, and "connects" in a library that has lost a connection.
"""

from __future__ import annotations

import errno
import sys
import threading
from pathlib import Path

import jax

from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.signals import StopSignals


def fail(error: OSError) -> None:
    raise error


def save() -> str:
    if action == "fails":
        raise OSError("No space left on device")
    if action == "hangs":
        threading.Event().wait()
    print("saving", flush=True)
    return "step 7"


action = sys.argv[1]
signals = StopSignals(grace_seconds=float(sys.argv[2]))
with signals.handle():
    signals.set_save(save)
    if action == "kept":
        signals.set_kept(lambda: "the complete batches are in runs")
    if action == "uploads":
        signals.on_exit = lambda code, reason: threading.Event().wait()
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 1_000_003, x))
    program = endless.lower(0).compile()
    print("ready", flush=True)
    if action == "writes":
        threading.Thread(target=fail, args=(OSError(errno.ENOSPC, "No space left on device"),)).start()
    if action == "own":
        threading.Thread(target=atomic_write, args=(Path("missing") / "file", "")).start()
    if action == "connects":
        threading.Thread(target=fail, args=(ConnectionResetError(errno.ECONNRESET, "reset by peer"),)).start()
    jax.block_until_ready(program(0))
