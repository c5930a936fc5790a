"""`rpt_jax.main` for a workdir in object storage: changes are uploaded at once, and locks soon become stale.

With the environment variable HOLD_AFTER, the run waits to be killed or stopped once it has written the metrics of that step.
"""

from __future__ import annotations

import os
import threading

from rpt_jax.infra import remote_workdir
from rpt_jax.infra.metrics import MetricsWriter
from rpt_jax.main import console_main

write = MetricsWriter.write


def write_and_hold(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
    write(self, step, scalars)
    if str(step) == os.environ.get("HOLD_AFTER"):
        threading.Event().wait()


remote_workdir.BEAT_SECONDS = 0.5
remote_workdir.STALE_SECONDS = 10.0
remote_workdir.PUSH_SECONDS = 0.2
remote_workdir.LONGEST_PAUSE_SECONDS = 0.2
MetricsWriter.write = write_and_hold
console_main()
