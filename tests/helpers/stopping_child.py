"""A process that is inside XLA for a long time, as a compilation or a rollout is; what its save does is the argument."""

from __future__ import annotations

import sys
import threading

import jax

from rpt_jax.infra.signals import save_on_stop, stops_on_signals


def write() -> None:
    raise OSError("No space left on device")


def save() -> str:
    if sys.argv[1] == "fails":
        raise OSError("No space left on device")
    if sys.argv[1] == "hangs":
        threading.Event().wait()
    print("saving", flush=True)
    return "step 7"


with stops_on_signals(grace=float(sys.argv[2])):
    save_on_stop(save)
    program = (
        jax.jit(lambda x: jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 1_000_003, x)).lower(0).compile()
    )
    print("ready", flush=True)
    if sys.argv[1] == "writes":
        threading.Thread(target=write).start()
    jax.block_until_ready(program(0))
