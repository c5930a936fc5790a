"""A process inside XLA for a long time, as during a compilation or a rollout.

`python -m tests.helpers.stopping_child ACTION GRACE_SECONDS`, where ACTION is what saving does: "works", "fails" or "hangs"; with
"kept", there is nothing to save; with "writes", a background thread fails to write instead.
"""

from __future__ import annotations

import sys
import threading

import jax

from rpt_jax.infra.signals import StopSignals


def fail_to_write() -> None:
    raise OSError("No space left on device")


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
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 1_000_003, x))
    program = endless.lower(0).compile()
    print("ready", flush=True)
    if action == "writes":
        threading.Thread(target=fail_to_write).start()
    jax.block_until_ready(program(0))
