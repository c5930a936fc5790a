"""One of several processes of a run: `python -m tests.helpers.multihost_child EVENT PROCESS PROCESSES PORT STALL_SECONDS`."""

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
from rpt_jax.distributed.rendezvous import Heartbeat, connect_processes
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.guards import guarded_loop


def main(event: str, process: int, processes: int, port: int, stall_seconds: int) -> int:
    heartbeat = Heartbeat()
    hosts = Hosts(address="127.0.0.1", port=port, processes=processes, process=process)
    with connect_processes(hosts, {"seed": 0}, heartbeat, 600.0, stall_seconds) as rendezvous:
        assert rendezvous is not None
        try:
            run(event, process, heartbeat)
        except UserError as error:
            rendezvous.exit_all(ExitCode.USER_ERROR, f"error: {error}")
    return 0


def run(event: str, process: int, heartbeat: Heartbeat) -> None:
    wait_for_all("start")
    heartbeat.beat("data")
    if event == "leader is frozen" and process == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if (event == "leader is killed" and process == 0) or (event == "another is killed" and process == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "another fails" and process == 1:
        raise UserError("data.path does not exist.")
    if event == "another stalls" and process == 1:
        time.sleep(3600)
    heartbeat.beat("rollout")
    with guarded_loop():  # As in training: the collectives of the processes must be allowed inside the transfer guard.
        ids = shard_prompts(np.arange(jax.process_count()), make_mesh(-1, 1, 1))
        total = to_host(ids).sum()
        stopping = in_any_process(process == 1)
    assert stopping
    if event == "leader fails at the end" and process == 0:
        time.sleep(2)  # The others are done.
        raise UserError("gs://bucket could not be written.")
    if process == 0:
        print(f"{jax.process_count()} processes, sum {total}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
