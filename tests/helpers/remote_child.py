"""`rpt_jax.main` for a workdir in object storage: changes are uploaded at once, and locks soon become stale.

With the variable KILL_AFTER, the run waits to be killed once it has written the metrics of that step. With STOP_AFTER,
its steps from that one on take long, so that a stop signal arrives before its end. With IDLE_SECONDS, requests are made again
after that time, and the run soon gives up.
"""

from __future__ import annotations

import os
import threading
import time

from rpt_jax.infra import remote_workdir, storage
from rpt_jax.infra.metrics import MetricsWriter
from rpt_jax.main import console_main

write = MetricsWriter.write


def write_and_hold(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
    write(self, step, scalars)
    if str(step) == os.environ.get("KILL_AFTER"):
        threading.Event().wait()
    if step >= int(os.environ.get("STOP_AFTER", "1000")):
        time.sleep(20)


remote_workdir.BEAT_SECONDS = 0.5
remote_workdir.STALE_SECONDS = 10.0
remote_workdir.PUSH_SECONDS = 0.2
remote_workdir.LONGEST_PAUSE_SECONDS = 0.2
if idle_seconds := os.environ.get("IDLE_SECONDS"):
    storage.IDLE_SECONDS = float(idle_seconds)
    remote_workdir.GIVE_UP_SECONDS = 5.0
MetricsWriter.write = write_and_hold
console_main()
