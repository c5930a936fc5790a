"""One of several processes of a run: `python -m tests.helpers.multihost_child WHAT PROCESS PROCESSES PORT`."""

from __future__ import annotations

import os
import signal
import sys
import time

import jax
import numpy as np

from rpt_jax.distributed.hosts import Hosts
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.processes import in_any_process, to_host, wait_for_all
from rpt_jax.distributed.rendezvous import at, end_all, joined
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.guards import guarded_loop

STALL_SECONDS = 4.0


def main(what: str, process: int, processes: int, port: int) -> int:
    try:
        with joined(Hosts("127.0.0.1", port, processes, process), {"seed": 0}, 60.0, STALL_SECONDS):
            wait_for_all("here")
            at("data")
            if what == "leader is frozen" and process == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "leader is killed" and process == 0 or what == "another is killed" and process == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "another fails" and process == 1:
                raise UserError("data.path is not here.")
            if what == "another stalls" and process == 1:
                time.sleep(60)
            at("rollout")
            with guarded_loop():  # As training is: what the processes tell each other must be allowed there.
                ids = shard_prompts(np.arange(processes), make_mesh(-1, 1, 1))
                total, stopping = to_host(ids).sum(), in_any_process(process == 1)
            assert stopping
            print(f"{jax.process_count()} processes, sum {total}")  # Said by process 0 alone.
    except UserError as error:
        end_all(2, f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
