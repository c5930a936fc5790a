"""`rpt_jax.main` for a workdir in object storage: changes are uploaded at once, and locks soon become stale."""

from __future__ import annotations

from rpt_jax.infra import remote_workdir
from rpt_jax.main import console_main

remote_workdir.BEAT_SECONDS = 0.5
remote_workdir.STALE_SECONDS = 3.0
remote_workdir.PUSH_SECONDS = 0.2
console_main()
