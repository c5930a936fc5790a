"""Rendezvous, heartbeats and coordinated shutdown of the processes of a run.

`jax.distributed` ends a process with a stack trace that does not say which process failed, and its collectives wait forever for a
process that never starts. Therefore every process keeps a TCP connection to process 0 and exchanges lines of JSON over it:

1. Rendezvous: each process reports its index and its configuration. Process 0 answers when all have connected, or sends all of
   them an error that names the process that is missing or differs.
2. Heartbeats: each process reports how far it has come. If no process makes progress for `stall_seconds`, all of them exit.
3. Shutdown: when one process exits, all exit, with the same exit code and a message that names its host.

Process 0 relays what it learns, so the other processes need no connections between each other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from rpt_jax.distributed.hosts import Hosts
from rpt_jax.errors import ExitCode, UserError

logger = logging.getLogger(__name__)

_NOTICE_SECONDS = 10.0  # How long to wait for another process before saying so.
_HEARTBEAT_SECONDS = 2.0  # Interval between two heartbeats.


class Heartbeat:
    """Progress of this process, fed by the loops and watched by `Rendezvous`.

    Attributes:
      count: number of completed phases.
      phase: name of the last one.
    """

    def __init__(self) -> None:
        self.count = 0
        self.phase = "startup"

    def beat(self, phase: str) -> None:
        """Report that `phase` was completed."""
        self.phase = phase
        self.count += 1


class Connection:
    """A TCP connection that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        # A host that loses power closes nothing. Keep-alive probes every 10 s end a silent connection after about a minute, and
        # the limit on unacknowledged data, in ms, one with heartbeats: the kernel would send those again for 15 minutes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6), ("TCP_USER_TIMEOUT", 60_000))
        for name, value in options:
            if hasattr(socket, name):  # Not on every platform.
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._file = connection.makefile("rb")
        self._send_lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message. Send errors are ignored: the thread that receives detects a dead peer."""
        with self._send_lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Return the next message, or None when the connection was closed or its other end is gone.

        Args:
          seconds: how long to wait; None for no limit.

        Raises:
          TimeoutError: nothing arrived within `seconds`.
          ValueError: the line is not a JSON object.
        """
        self._connection.settimeout(seconds)
        try:
            text = self._file.readline(1 << 20)
        except OSError as error:
            # ETIMEDOUT, by which the kernel reports a host that is gone, is a TimeoutError as well.
            if isinstance(error, TimeoutError) and seconds is not None:
                raise
            return None
        message = json.loads(text) if text else None
        if message is not None and not isinstance(message, dict):
            raise ValueError(text)
        return message

    def is_closed(self) -> bool:
        """Return whether the other end was closed, without waiting; what has arrived stays to be received."""
        self._connection.settimeout(0)
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


class Members(NamedTuple):
    """The processes of a run after the rendezvous.

    Attributes:
      names: host name of each process.
      connections: of process 0, one to each other process; of the others, the one to process 0.
    """

    names: dict[int, str]
    connections: dict[int, Connection]


# --- 1. rendezvous ---------------------------------------------------------------------------------


def meet(hosts: Hosts, facts: Mapping[str, Any], join_seconds: float) -> Members:
    """Connect to all processes of the run and check that they belong together.

    Args:
      hosts: this process's place among them.
      facts: values that must be equal in all processes, by name.
      join_seconds: how long to wait for the other processes.

    Raises:
      UserError: a process is missing, cannot be reached or has other facts. All processes that have connected raise the same
        error. Its code is `ExitCode.RESTART` if a process was gone or late.
    """
    if hosts.process == 0:
        return _accept_processes(hosts, facts, join_seconds)
    return _connect_to_leader(hosts, facts, join_seconds)


def _accept_processes(hosts: Hosts, facts: Mapping[str, Any], join_seconds: float) -> Members:
    """As process 0, wait until all other processes have connected; the arguments are those of `meet`."""
    # Listen on the port that the other processes know.
    names = {0: socket.gethostname()}
    connections: dict[int, Connection] = {}
    try:
        server = socket.create_server(("", hosts.port))
    except OSError as error:
        raise UserError(
            f"process 0 on {names[0]} cannot listen on port {hosts.port} ({error.strerror}); another run may be using it. Give "
            "all processes another port with --coordinator=HOST:PORT.",
            field=hosts.names.address,
        ) from None

    # Accept the processes one by one, until all have reported or the first problem is found.
    start = time.monotonic()
    notified = False
    accepted: list[Connection] = []
    problem: UserError | None = None
    with server:
        while len(names) < hosts.processes and not problem:
            missing = [str(process) for process in range(hosts.processes) if process not in names]
            awaited = f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {hosts.processes}"
            seconds_left = start + join_seconds - time.monotonic()
            server.settimeout(max(0.001, seconds_left if notified else min(seconds_left, _NOTICE_SECONDS)))
            try:
                connection = Connection(server.accept()[0])
                report = connection.receive(_NOTICE_SECONDS)
                # A process that was lost since it has connected may be started again.
                for process in [process for process, earlier in connections.items() if earlier.is_closed()]:
                    del connections[process], names[process]
                problem = _mismatch(report, names, hosts, facts)
                accepted.append(connection)
                if problem is None and report is not None:
                    connections[report["process"]] = connection
                    names[report["process"]] = report["host"]
            except TimeoutError:
                if time.monotonic() - start >= join_seconds:
                    problem = UserError(
                        f"process 0 on {names[0]} waited {join_seconds:g} s (--join_seconds) for {awaited}, which did not "
                        f"connect. Check that they were started ({hosts.names.processes}={hosts.processes}) and can reach "
                        f"{hosts.address}:{hosts.port} ({hosts.names.address}).",
                        field=hosts.names.processes,
                        code=ExitCode.RESTART,
                    )
                elif not notified:
                    logger.warning("process 0 on %s waits for %s on port %d.", names[0], awaited, hosts.port)
                    notified = True
            except (KeyError, TypeError, ValueError):
                continue  # Not a process of this run, for example a port scanner.

    # Tell all that have connected, so that they raise the same error.
    for connection in accepted:
        if problem:
            connection.send(end=int(problem.code), why=str(problem), field=problem.field)
        else:
            connection.send(names=names)
    if problem:
        raise problem
    return Members(names=names, connections=connections)


def _mismatch(report: Any, names: Mapping[int, str], hosts: Hosts, facts: Mapping[str, Any]) -> UserError | None:
    """Return the error for a process that cannot take part; None if it can."""
    process = report["process"]
    name = f"process {process} on {report['host']}"
    if report["processes"] != hosts.processes:
        return UserError(
            f"{name} was started as one of {report['processes']} processes, process 0 on {names[0]} as one of "
            f"{hosts.processes} ({hosts.names.processes}): start all with one command.",
            field=hosts.names.processes,
        )
    if process in names:
        return UserError(
            f"{name} was started twice, also on {names[process]}: every process needs its own {hosts.names.process}.",
            field=hosts.names.process,
        )
    theirs = report["facts"]
    differing = sorted(fact for fact in facts.keys() | theirs.keys() if facts.get(fact) != theirs.get(fact))
    if not differing:
        return None
    changes = "; ".join(f"{fact}: {theirs.get(fact)!r} there, {facts.get(fact)!r} here" for fact in differing[:5])
    return UserError(
        f"{name} differs from process 0 on {names[0]} ({changes}): start all processes with the same command.",
        field=differing[0],
    )


def _connect_to_leader(hosts: Hosts, facts: Mapping[str, Any], join_seconds: float) -> Members:
    """As another process, connect to process 0 and wait until all have connected."""
    name = f"process {hosts.process} of {hosts.processes} on {socket.gethostname()}"
    deadline = time.monotonic() + join_seconds
    connection = Connection(_connect(hosts, hosts.port, name, join_seconds, deadline))
    connection.send(process=hosts.process, processes=hosts.processes, host=socket.gethostname(), facts=facts)
    try:
        # Wait a little longer than process 0 does, because its message names the processes that are missing.
        answer = connection.receive(max(0.0, deadline - time.monotonic()) + _NOTICE_SECONDS)
    except (TimeoutError, ValueError):
        raise UserError(
            f"{name} waited {join_seconds:g} s (--join_seconds) for process 0 to confirm that all processes have connected.",
            field="--join_seconds",
            code=ExitCode.RESTART,
        ) from None
    if answer is None:
        raise UserError(
            f"process 0 at {hosts.address}:{hosts.port} exited while {name} was waiting for the other processes.",
            field=hosts.names.address,
            code=ExitCode.RESTART,
        )
    if "end" in answer:
        raise UserError(answer["why"], field=answer.get("field", ""), code=ExitCode(answer["end"]))
    # Check the port of JAX's coordination service here: if JAX cannot reach it, it aborts with a stack trace.
    try:
        _connect(hosts, hosts.port + 1, name, join_seconds, time.monotonic() + join_seconds).close()
    except UserError as error:
        # Process 0 could be reached on the other port: unless it is gone by now, this one is blocked.
        error.code = ExitCode.RESTART if connection.is_closed() else ExitCode.USER_ERROR
        connection.send(end=int(error.code), why=str(error), field=error.field)
        raise
    names = {int(process): host for process, host in answer["names"].items()}
    return Members(names=names, connections={0: connection})


def _connect(hosts: Hosts, port: int, name: str, join_seconds: float, deadline: float) -> socket.socket:
    """Connect to process 0, which may not be listening yet. Raises: UserError."""
    notified = False
    while True:
        seconds_left = deadline - time.monotonic()
        try:
            return socket.create_connection((hosts.address, port), timeout=max(0.1, min(_NOTICE_SECONDS, seconds_left)))
        except OSError as error:
            reason = error.strerror or str(error)
        if seconds_left <= 0:
            raise UserError(
                f"{name} waited {join_seconds:g} s (--join_seconds) for process 0 at {hosts.address}:{port} ({reason}). Check "
                f"that process 0 is running, that this is its address ({hosts.names.address}), and that the port is open "
                "between the hosts.",
                field=hosts.names.address,
                code=ExitCode.RESTART,
            )
        if not notified and seconds_left < join_seconds - _NOTICE_SECONDS:
            logger.warning("%s waits for process 0 at %s:%d (%s).", name, hosts.address, port, reason)
            notified = True
        time.sleep(min(0.5, max(0.0, seconds_left)))


# --- 2. heartbeats and 3. shutdown -----------------------------------------------------------------


class Rendezvous:
    """The connections to the other processes while the run lasts: watches their progress and exits with them.

    Args:
      hosts: this process's place among them.
      members: as `meet` returns them.
      heartbeat: the progress of this process.
      stall_seconds: exit if no process makes progress for this long.
    """

    def __init__(self, hosts: Hosts, members: Members, heartbeat: Heartbeat, stall_seconds: float):
        self._hosts = hosts
        self._names = members.names
        self._connections = members.connections
        self._heartbeat = heartbeat
        self._stall_seconds = stall_seconds
        self._progress = {process: (0, "startup") for process in members.names}
        self._last_progress = time.monotonic()
        self._left = False
        self._leaving = {process: threading.Event() for process in members.connections}
        # Taken when this process learns that it must exit, so that only the first cause is reported. Also taken by `leave`.
        self._exit_lock = threading.Lock()
        for process, connection in members.connections.items():
            threading.Thread(target=self._listen, args=(process, connection), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _name(self, process: int) -> str:
        return f"process {process} on {self._names[process]}"

    def _record(self, process: int, count: int, phase: str) -> None:
        if self._progress[process][0] != count:
            self._last_progress = time.monotonic()
        self._progress[process] = (count, phase)

    def _watch(self) -> None:
        """Send heartbeats, and exit if no process makes progress."""
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            count = self._heartbeat.count
            phase = self._heartbeat.phase
            self._record(self._hosts.process, count, phase)
            for connection in self._connections.values():
                connection.send(count=count, phase=phase)
            # Process 0 knows which processes lag. The others wait longer, so that its message comes first.
            grace = 0.0 if self._hosts.process == 0 else 0.1 * self._stall_seconds + 2 * _HEARTBEAT_SECONDS
            if time.monotonic() - self._last_progress - self._stall_seconds > grace:
                self._exit(ExitCode.RESTART, self._describe_stall())

    def _describe_stall(self) -> str:
        """Name the processes that lag, as process 0 knows them."""
        stalled = f"no progress for {self._stall_seconds:g} s (--stall_seconds)"
        if self._hosts.process:
            return f"{stalled}, and {self._name(0)} does not respond."
        lowest = min(count for count, _ in self._progress.values())
        lagging = {process: phase for process, (count, phase) in self._progress.items() if count == lowest}
        if len(lagging) == len(self._progress):
            return f"{stalled}: all {len(lagging)} processes stopped after phase {lagging[0]}."
        names = ", ".join(
            f"{self._name(process)}, which stopped after phase {phase}" for process, phase in lagging.items()
        )
        return f"{stalled}: all wait for {names}."

    def _listen(self, process: int, connection: Connection) -> None:
        """Receive the messages of one process until it exits."""
        while True:
            try:
                message = connection.receive()
            except ValueError:
                message = None
            if message is None:
                self._exit(
                    ExitCode.RESTART, f"{self._name(process)} is gone: killed, out of memory, or its host is down."
                )
                return
            if "end" in message:
                self._exit(message["end"], message["why"])
                return
            if "leaving" in message:
                self._leaving[process].set()
                continue
            self._record(process, message["count"], message["phase"])

    def _exit(self, code: int, reason: str) -> None:
        """Exit because of another process; do nothing if this process is exiting already."""
        if not self._exit_lock.acquire(blocking=False):
            return
        # Printed and not logged: the main thread may hold the lock of a logging handler.
        print(f"error: {reason}", file=sys.stderr, flush=True)
        self._send_exit(code, reason)
        _exit_now(code)

    def _send_exit(self, code: int, reason: str) -> None:
        for connection in self._connections.values():
            connection.send(end=int(code), why=reason)
        if self._hosts.process == 0:
            # This process hosts JAX's coordination service. Its end aborts the others, so give them time to read the reason.
            time.sleep(_HEARTBEAT_SECONDS / 2)

    def announce_exit(self, code: int, reason: str) -> None:
        """Make the other processes exit with `code`, because this one is about to; does nothing after `leave`."""
        if self._left:
            return
        self._send_exit(code, f"{self._name(self._hosts.process)} ended: {reason}")

    def exit_all(self, code: int, reason: str) -> None:
        """Print `reason`, and exit this process and all others with `code`; returns only after `leave`."""
        if self._left:
            return
        # A collective may have failed because another process exited. Wait for its message, which names the cause.
        time.sleep(_HEARTBEAT_SECONDS)
        if not self._exit_lock.acquire(blocking=False):
            threading.Event().wait()  # Another thread is exiting this process.
        print(reason, file=sys.stderr, flush=True)
        self.announce_exit(code, reason)
        _exit_now(code)

    def leave(self) -> None:
        """Stop watching the other processes and shut JAX's service down. A collective: every process must call it."""
        import jax

        if self._left:
            return
        # Process 0 may be uploading for longer than JAX's service waits, and fail. So all meet here first, still watched.
        if self._hosts.process:
            self._connections[0].send(leaving=True)
        for leaving in self._leaving.values():
            leaving.wait()
        if self._hosts.process == 0:
            for connection in self._connections.values():
                connection.send(leaving=True)
        self._exit_lock.acquire()
        self._left = True
        jax.distributed.shutdown()


def _exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    # A normal exit would make JAX wait for processes that may be inside a collective.
    os._exit(code)


@contextlib.contextmanager
def connect_processes(
    hosts: Hosts | None, facts: Mapping[str, Any], heartbeat: Heartbeat, join_seconds: float, stall_seconds: float
) -> Iterator[Rendezvous | None]:
    """Connect the processes of a run and initialize `jax.distributed`; must be entered before JAX has a backend.

    Args:
      hosts: this process's place among them; None for a run of one process, which yields None.
      facts: values that must be equal in all processes, by name.
      heartbeat: the progress of this process.
      join_seconds: how long to wait for the other processes.
      stall_seconds: exit if no process makes progress for this long.

    Yields:
      The rendezvous. An exception that leaves the context does not end the other processes: call `exit_all` for that.

    Raises:
      UserError: as `meet` does.
    """
    if hosts is None:
        yield None
        return
    members = meet(hosts, facts, join_seconds)
    import jax

    # This package handles signals itself (infra/signals.py).
    jax.config.update("jax_enable_preemption_service", False)
    rendezvous = Rendezvous(hosts, members, heartbeat, stall_seconds)
    try:
        jax.distributed.initialize(
            coordinator_address=f"{hosts.address}:{hosts.port + 1}",
            num_processes=hosts.processes,
            process_id=hosts.process,
            local_device_ids=hosts.local_devices,
            # What JAX would detect is given above, except for the local devices: under Slurm, JAX would use one per process.
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(join_seconds),
            # Only a fallback: `Rendezvous` notices a dead process earlier, and says which one it was.
            heartbeat_timeout_seconds=math.ceil(2 * stall_seconds) + 60,
        )
    except Exception as error:
        rendezvous.announce_exit(ExitCode.BUG, str(error))
        raise
    yield rendezvous
    rendezvous.leave()
