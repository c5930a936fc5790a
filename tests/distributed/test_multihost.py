"""Runs of several processes: detection, rendezvous, and lost processes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from rpt_jax.distributed.hosts import Hosts, Names, find_hosts
from rpt_jax.distributed.rendezvous import Connection, Heartbeat, Members, Rendezvous, meet
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.main import exit_code_and_message
from tests.helpers.parameters import mostly_slow
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, HERE, free_port, run_children, starter

# --- detection ---

SLURM = {"SLURM_JOB_ID": "41", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
NODES = {"SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.job,t-1.job", "TPU_WORKER_ID": "1"}
MULTISLICE = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0-0.job:8080"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # A batch script, outside of srun.
        (SLURM | {"SLURM_STEP_NODELIST": "node[003-006]"}, Hosts("node003", 20082, 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "a7,b[1-3]"}, Hosts("a7", 20082, 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "n-[01,07-09],x"}, Hosts("n-01", 20082, 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "rack0[1-2]n[1-4]"}, Hosts("rack01n1", 20082, 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[1-2]-ib,x[3-4]"}, Hosts("n1-ib", 20082, 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[01,03]x"}, Hosts("gpu01x", 20082, 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (TPU, Hosts("t-0.job", 8476, 2, 1)),
        (TPU | MULTISLICE, Hosts("s0-0.job", 8476, 4, 3)),
        (
            {"JAX_COORDINATOR_ADDRESS": "w-0-0.w:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            Hosts("w-0-0.w", 1234, 2, 0),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "w", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_processes_are_detected_from_the_environment(environ: Mapping[str, str], expected: Hosts | None) -> None:
    found = find_hosts(None, None, None, environ)
    assert (found and found[:4]) == (expected and expected[:4])


def test_flags_take_precedence_over_the_environment() -> None:
    environ = SLURM | {"SLURM_STEP_NODELIST": "node[003-006]"}
    assert find_hosts("h:5", 2, 1, environ) == Hosts("h", 5, 2, 1)
    assert find_hosts("h:5", 1, 0, environ) is None


def test_a_flag_replaces_one_value_of_the_environment_and_leaves_the_others() -> None:
    environ = SLURM | {"SLURM_STEP_NODELIST": "node[003-006]"}
    found = find_hosts("h:5", None, None, environ)
    assert found == Hosts("h", 5, 4, 3, names=Names("--coordinator", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, (2, 3)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,3", "CUDA_VISIBLE_DEVICES": "4,5,6"}, (1,)),
        # Each task sees only its own GPUs, as with --gpus-per-task.
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "3"}, None),
        # Slurm does not manage the GPUs.
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_LOCAL_DEVICE_IDS": "0,5"}, (0, 5)),
    ],
)
def test_the_tasks_of_a_slurm_node_divide_its_gpus(
    environ: Mapping[str, str], expected: tuple[int, ...] | None
) -> None:
    step = SLURM | {"SLURM_STEP_NODELIST": "node[003-006]", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
    found = find_hosts(None, None, None, step | environ)
    assert found and found.local_devices == expected


ALL_GPUS = """
import sys, jax
from rpt_jax.distributed.hosts import Hosts
from rpt_jax.distributed.rendezvous import Heartbeat, connect_processes
devices = (2, 3) if len(sys.argv) > 2 else None
hosts = Hosts("127.0.0.1", int(sys.argv[1]), 1, 0, devices)
with connect_processes(hosts, {}, Heartbeat(), 60.0, 60.0):
    print(jax.config.values["jax_cuda_visible_devices"])
"""


@pytest.mark.parametrize(("more", "visible"), [((), "all"), (("some",), "2,3")])
def test_jax_uses_the_gpus_of_hosts_and_not_one_per_slurm_task(more: tuple[str, ...], visible: str) -> None:
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "a",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    command = [sys.executable, "-c", ALL_GPUS, str(free_port()), *more]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | step, capture_output=True, text=True, check=True)
    assert result.stdout == f"{visible}\n"


@pytest.mark.parametrize(
    ("flags", "environ", "field", "sentence"),
    [
        (("h:5", None, None), {}, "--processes", "--processes and --process must be given as well"),
        ((None, 2, 1), {}, "--coordinator", "--coordinator must be given as well"),
        (("h:99999", 2, 1), {}, "--coordinator", "--coordinator=h:99999 must be HOST:PORT of process 0"),
        (("h:5", 2, 2), {}, "--process", "--process=2 must be from 0 to 1, because --processes=2"),
        (("h:5", 0, 0), {}, "--processes", "--processes=0 must be at least 1"),
        (
            (None, None, None),
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_COORDINATOR_ADDRESS",
            "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID must be given",
        ),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID", "TPU_WORKER_ID must be given"),
        ((None, None, None), TPU | {"TPU_WORKER_ID": "x"}, "TPU_WORKER_ID", "TPU_WORKER_ID=x must be an integer"),
        ((None, None, None), SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NODELIST must be given"),
        *(
            ((None, None, None), SLURM | NODES | {name: value}, name, f"{name}={value} must be")
            for name, value in {
                "SLURM_JOB_ID": "41_3",
                "SLURM_STEP_NUM_TASKS": "2(x2)",
                "SLURM_PROCID": "first",
                "SLURM_STEP_NODELIST": "[1-2]",
                "SLURM_NODEID": "one",
                "SLURM_LOCALID": "x",
                "SLURM_STEP_TASKS_PER_NODE": "4(x",
                "JAX_LOCAL_DEVICE_IDS": "a",
            }.items()
        ),
        (
            (None, None, None),
            SLURM | NODES | {"SLURM_NODEID": "2"},
            "SLURM_STEP_TASKS_PER_NODE",
            "with one for node SLURM_NODEID=2",
        ),
        (
            (None, None, None),
            SLURM | NODES | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            "SLURM_STEP_TASKS_PER_NODE",
            "the nearest number of tasks that can is 2",
        ),
    ],
)
def test_a_value_that_is_missing_or_out_of_range_is_named(flags, environ, field, sentence) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as raised:
        find_hosts(*flags, environ)
    assert raised.value.field == field


# --- rendezvous ---

# Limits that must pass in a test, in seconds. If a process of a busy machine came too late for one, the next is tried.
JOIN_SECONDS = (1, 10, 100)


def meet_all(*members: tuple[Hosts, dict], seconds: float = 20.0) -> list[object]:
    """Call `meet` as several processes; return the host names or the error message of each."""
    results: list[object] = [None] * len(members)

    def take_part(number: int, hosts: Hosts, facts: dict) -> None:
        try:
            results[number] = meet(hosts, facts, seconds).names
        except UserError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=take_part, args=(i, *member)) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_process_that_does_not_connect_is_named_by_all_others() -> None:
    port, seconds, told = 0, 0, []
    for seconds in JOIN_SECONDS:
        port = free_port()
        told = meet_all(*((Hosts("127.0.0.1", port, 4, process), {}) for process in (0, 2)), seconds=seconds)
        if told[0] == told[1]:
            break
    assert told[0] == told[1]
    assert told[0] == (
        f"process 0 on {HERE} waited {seconds} s (--join_seconds) for processes 1, 3 of 4, which did not connect. Check that "
        f"they were started (--processes=4) and can reach 127.0.0.1:{port} (--coordinator)."
    )


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (
            ((3, 1), {"seed": 0}),
            f"process 1 on {HERE} was started as one of 3 processes, process 0 on {HERE} as one of 2 (--processes)",
        ),
        (((2, 1), {"seed": 1}), f"process 1 on {HERE} differs from process 0 on {HERE} (seed: 1 there, 0 here)"),
    ],
)
def test_processes_of_different_runs_are_refused(second, sentence: str) -> None:
    port = free_port()
    (count, facts) = second
    told = meet_all((Hosts("127.0.0.1", port, 2, 0), {"seed": 0}), (Hosts("127.0.0.1", port, *count), facts))
    assert told[0] == told[1] and told[0].startswith(sentence)


def test_two_processes_with_the_same_index_are_refused() -> None:
    port = free_port()
    told = meet_all(*((Hosts("127.0.0.1", port, 3, process), {}) for process in (0, 1, 1)))
    assert told[0] == told[1] and f"process 1 on {HERE} was started twice" in told[0]


def test_a_process_that_was_lost_during_the_rendezvous_may_come_again() -> None:
    port = free_port()
    hosts = Hosts("127.0.0.1", port, 3, 0)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(meet_all, (hosts, {}), seconds=CHILD_SECONDS)

        def report(process: int) -> socket.socket:
            connection = connect_while_running(port, leader)
            assert connection
            Connection(connection).send(process=process, processes=3, host=f"host {process}", facts={})
            return connection

        report(1).shutdown(socket.SHUT_RDWR)
        rest = [report(process) for process in (1, 2)]
        assert leader.result() == [{0: HERE, 1: "host 1", 2: "host 2"}]
        for connection in rest:
            assert Connection(connection).receive() == {"names": {"0": HERE, "1": "host 1", "2": "host 2"}}
            connection.close()


def test_a_process_that_is_late_or_gone_ends_the_others_with_the_code_for_a_restart() -> None:
    port = free_port()
    for process in (0, 1):  # The other one never starts.
        with pytest.raises(UserError) as raised:
            meet(Hosts("127.0.0.1", port, 2, process), {}, 0.1)
        assert raised.value.code == ExitCode.RESTART

    def answer(server: socket.socket, **message: object) -> None:
        accepted = server.accept()[0]
        connection = Connection(accepted)
        connection.receive()
        if message:
            connection.send(**message)
        accepted.shutdown(socket.SHUT_RDWR)

    # Process 0 ends without a word, says that another process is late, or is lost before JAX's service has started.
    for message in ({}, {"end": ExitCode.RESTART, "why": "late"}, {"names": {0: "a", 1: "b"}}):
        with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as pool:
            pool.submit(answer, server, **message)
            with pytest.raises(UserError) as raised:
                meet(Hosts("127.0.0.1", port, 2, 1), {}, 1.0)
        assert exit_code_and_message(raised.value)[0] == ExitCode.RESTART


def test_an_unreachable_process_0_is_reported_with_address_and_reason() -> None:
    port = free_port()
    [told] = meet_all((Hosts("127.0.0.1", port, 2, 1), {}), seconds=1.0)
    assert told.startswith(f"process 1 of 2 on {HERE} waited 1 s (--join_seconds) for process 0 at 127.0.0.1:{port} (")
    assert "Connection refused" in told


def test_a_blocked_second_port_is_reported_to_process_0() -> None:
    port, received = free_port(), []
    server = socket.create_server(("127.0.0.1", port))

    def answer() -> None:
        connection = Connection(server.accept()[0])
        connection.receive()
        connection.send(names={0: "a", 1: "b"})  # Nothing listens on the next port.
        received.append(connection.receive())

    leader = threading.Thread(target=answer)
    leader.start()
    [told] = meet_all((Hosts("127.0.0.1", port, 2, 1), {}), seconds=1.0)
    leader.join()
    server.close()
    assert f"for process 0 at 127.0.0.1:{port + 1} (Connection refused)" in told
    assert received == [{"end": 2, "why": told, "field": "--coordinator"}]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        [told] = meet_all((Hosts("127.0.0.1", port, 2, 0), {}))
    assert f"process 0 on {HERE} cannot listen on port {port} (Address already in use" in told


def test_messages_name_the_variables_of_slurm_where_it_gave_the_values() -> None:
    found = find_hosts(None, None, None, SLURM | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_PROCID": "0"})
    assert found is not None
    with pytest.raises(UserError) as raised:
        meet(found._replace(port=free_port()), {}, 0.1)
    assert raised.value.field == "SLURM_STEP_NUM_TASKS"
    assert "--" not in str(raised.value).replace("--join_seconds", "")
    with pytest.raises(UserError) as raised:
        meet(found._replace(port=free_port(), process=1), {}, 0.1)
    assert raised.value.field == "SLURM_STEP_NODELIST"


def connect_while_running(port: int, leader: Future[list[object]]) -> socket.socket | None:
    """Connect to a port that `leader` is about to listen on; return None if it ends before."""
    while not leader.done():
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.01)
    return None


def test_other_connections_to_the_port_are_ignored() -> None:
    told: list[object] = []
    for seconds in JOIN_SECONDS:
        hosts = Hosts("127.0.0.1", free_port(), 2, 0)
        with ThreadPoolExecutor(1) as pool:
            leader = pool.submit(meet_all, (hosts, {}), seconds=seconds)
            connections = []
            for text in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": 1}\n'):
                connections.append(connect_while_running(hosts.port, leader))
                if connections[-1]:
                    with connections[-1] as stranger:
                        stranger.sendall(text)
            told = leader.result()
        if all(connections):
            break
    assert "for process 1 of 2, which did not connect" in str(told[0])


# --- lost processes ---


class LostHost:
    """A socket whose other end is a host that lost power."""

    def setsockopt(self, *_: object) -> None:
        """Accept any option."""

    def settimeout(self, seconds: float | None) -> None:
        """Accept any limit."""

    def makefile(self, _: str) -> LostHost:
        return self

    def readline(self, _: int) -> bytes:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def test_a_host_that_lost_power_is_gone_and_not_late() -> None:
    connection = Connection(LostHost())
    assert connection.receive() is None
    with pytest.raises(TimeoutError):
        connection.receive(1.0)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the platform has no such limit")
def test_heartbeats_that_nobody_acknowledges_end_a_connection_after_a_minute() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        Connection(client)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


@pytest.fixture
def start() -> Iterator[object]:
    with starter() as start_all:
        yield start_all


KILLED = ("another is killed", [ExitCode.RESTART, -signal.SIGKILL, ExitCode.RESTART], "process 1 on {} is gone: killed")

FAILED_LATE = ("leader fails at the end", [2, 2, 2], "process 0 on {} ended: error: gs://bucket could not be written.")


@pytest.mark.parametrize(
    ("event", "codes", "sentence"),
    mostly_slow(
        [
            ("nothing", [0, 0, 0], ""),
            KILLED,
            ("another fails", [2, 2, 2], "process 1 on {} ended: error: data.path does not exist."),
            FAILED_LATE,
        ],
        KILLED,
        FAILED_LATE,
    ),
)
def test_all_processes_exit_with_the_one_that_failed_and_name_it(
    start, event: str, codes: list[int], sentence: str
) -> None:
    found, outputs = run_children(start, event, 3)
    assert found == codes, outputs
    printed = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outputs]
    assert printed == ([["3 processes, sum 3"], [], []] if event == "nothing" else [[], [], []])
    for number, (_, err) in enumerate(outputs):
        if (event, number) in (("another fails", 1), ("leader fails at the end", 0)):
            assert sentence.rpartition("ended: ")[2] in err
        elif codes[number] > 0:
            assert f"error: {sentence.format(HERE)}" in err, err


def test_processes_wait_for_each_other_before_jax_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    shut_down: list[str] = []
    monkeypatch.setattr("jax.distributed.shutdown", lambda: shut_down.append(threading.current_thread().name))
    with socket.create_server(("127.0.0.1", 0)) as server:
        sockets = [socket.create_connection(server.getsockname()), server.accept()[0]]
    names = {0: "a", 1: "b"}
    leader, other = (
        Rendezvous(
            Hosts("a", 1, 2, process), Members(names, {1 - process: Connection(own)}), Heartbeat(), CHILD_SECONDS
        )
        for process, own in enumerate(sockets)
    )
    thread = threading.Thread(target=other.leave, name="other")
    thread.start()
    thread.join(0.2)
    assert not shut_down  # Process 0 is uploading.
    leader.leave()
    thread.join()
    assert len(shut_down) == 2


def test_the_loss_of_process_0_is_detected(start) -> None:
    """Process 0 also hosts JAX's service, so JAX may abort the other processes before they print the reason."""
    codes, outputs = run_children(start, "leader is killed", 2)
    assert codes[1] in (ExitCode.RESTART, -signal.SIGABRT)
    err = outputs[1][1]
    assert f"process 0 on {HERE} is gone" in err or "JAX distributed service" in err
