"""The processes of a run meet before JAX connects them, and learn of each other's end as long as they run.

JAX's own service ends a process by a stack trace that names nobody, and its collectives wait for ever for a process that does
not come. So every process has a line to process 0, over which a few words of JSON go: who I am, how far I am, how I ended.
Whatever ends one of them ends all, with the same exit code and a sentence that says which host it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rpt_jax.distributed.hosts import Hosts
from rpt_jax.errors import UserError
from rpt_jax.infra.signals import RESTART, before_end

_SAY_AFTER = 10.0  # Seconds of waiting for somebody before it is said.
_BEAT = 2.0  # Seconds between two words on how far a process is.

_meeting: _Meeting | None = None


class _Line:
    """Lines of JSON over one connection."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        # A host that is gone sends no end: the kernel asks it every 10 s, and gives up after a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):  # Not on every system.
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection, self._file = connection, connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, **words: Any) -> None:
        """Whoever does not hear any more is noticed where it is listened to."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(words).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Return what was sent next; None at the end of the line. Raises: TimeoutError; ValueError, for other than words."""
        self._connection.settimeout(seconds)
        try:
            text = self._file.readline(1 << 20)
        except TimeoutError:
            raise
        except OSError:
            return None
        words = json.loads(text) if text else None
        if words is not None and not isinstance(words, dict):
            raise ValueError(text)
        return words


class _Meeting:
    """This process's lines to the others: of process 0 one to each, of the others one to process 0."""

    def __init__(self, hosts: Hosts, names: Mapping[int, str], lines: Mapping[int, _Line], stall_seconds: float):
        self._hosts, self._names, self._lines, self._stall = hosts, names, lines, stall_seconds
        self._places = {process: (0, "the start") for process in names}
        self._moved = time.monotonic()
        self._ending = threading.Lock()  # Held from the first end that this process hears of, its own included.
        for process, line in lines.items():
            threading.Thread(target=self._listen, args=(process, line), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def at(self, place: str) -> None:
        count, _ = self._places[self._hosts.process]
        self._move(self._hosts.process, count + 1, place)

    def _move(self, process: int, count: int, place: str) -> None:
        if self._places[process][0] != count:
            self._moved = time.monotonic()
        self._places[process] = (count, place)

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT)
            count, place = self._places[self._hosts.process]
            for line in self._lines.values():
                line.send(count=count, place=place)
            late = time.monotonic() - self._moved - self._stall
            if late > (0.0 if self._hosts.process == 0 else 0.1 * self._stall + 2 * _BEAT):
                self.end(RESTART, self._stalled())

    def _stalled(self) -> str:
        """Who is behind, as process 0 knows; the others wait a little longer for its word."""
        if self._hosts.process:
            return f"nothing moved for {self._stall:g} s (--stall_seconds), and {self._name(0)} says nothing."
        last = min(count for count, _ in self._places.values())
        behind = {process: place for process, (count, place) in self._places.items() if count == last}
        if len(behind) == len(self._places):
            who = f"all {len(behind)} processes are behind {behind[0]}"
        else:
            who = f"all wait for {', '.join(f'{self._name(p)}, behind {place}' for p, place in behind.items())}"
        return f"nothing moved for {self._stall:g} s (--stall_seconds): {who}."

    def _name(self, process: int) -> str:
        return f"process {process} on {self._names[process]}"

    def _listen(self, process: int, line: _Line) -> None:
        while True:
            try:
                words = line.receive()
            except ValueError:
                words = None
            if words is None:
                return self.end(RESTART, f"{self._name(process)} is gone: killed, out of memory, or its host is down.")
            if "end" in words:
                return self.end(words["end"], words["why"])
            self._move(process, words["count"], words["place"])

    def end(self, code: int, why: str, own: bool = False) -> None:
        """End this process, and by a word to them the others; `own`: for what happened here."""
        if not self._ending.acquire(blocking=False):
            if not own:
                return
            threading.Event().wait()  # What ends this process just now is the cause.
        print(why if own else f"error: {why}", file=sys.stderr, flush=True)
        self.tell(code, f"{self._name(self._hosts.process)} ended: {why}" if own else why)
        sys.stdout.flush()
        os._exit(code)  # JAX would wait for the others, which may be inside a collective.

    def tell(self, code: int, why: str) -> None:
        for line in self._lines.values():
            line.send(end=code, why=why)
        if self._hosts.process == 0:
            # It also keeps JAX's service, whose end would end the others before they have heard why.
            time.sleep(_BEAT / 2)

    def close(self) -> None:
        """Hear no more of the others, all of which have come to the same end."""
        self._ending.acquire()


@contextlib.contextmanager
def joined(hosts: Hosts | None, facts: Mapping[str, Any], join_seconds: float, stall_seconds: float) -> Iterator[None]:
    """Inside, JAX has the devices of all `hosts`; None: this process alone, and nothing happens.

    Only process 0 prints. To be entered before JAX has a backend.

    Args:
      facts: what must be alike in all processes, by name.
      join_seconds: how long to wait for the others at the start.
      stall_seconds: how long no process may come any further before all end.

    Raises: UserError, where the others do not come, cannot be reached or have other facts.
    """
    global _meeting
    if hosts is None:
        yield
        return
    names, lines = (_gather if hosts.process == 0 else _report)(hosts, facts, join_seconds)
    import jax

    # Signals are ours (infra.stopping).
    jax.config.update("jax_enable_preemption_service", False)
    _meeting = _Meeting(hosts, names, lines, stall_seconds)
    before_end(lambda code, why: _meeting.tell(code, f"process {hosts.process} on {names[hosts.process]} ended: {why}"))
    jax.distributed.initialize(
        f"{hosts.address}:{hosts.port + 1}",
        hosts.processes,
        hosts.process,
        initialization_timeout=math.ceil(join_seconds),
        # What is noticed here first ends with a sentence; this is for when these threads have died.
        heartbeat_timeout_seconds=math.ceil(2 * stall_seconds) + 60,
    )
    with contextlib.ExitStack() as stack:
        if hosts.process:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    leave()


def leave() -> None:
    """Part from the other processes, all of which come here, too."""
    global _meeting
    if _meeting:
        import jax

        before_end(None)
        _meeting.close()
        _meeting = None
        jax.distributed.shutdown()


def end_all(code: int, why: str) -> None:
    """With several processes, say why and end them all: this one failed. Does not return then."""
    if _meeting:
        time.sleep(_BEAT)  # Where a collective failed because another process ended, that is the cause, and heard of.
        _meeting.end(code, why, own=True)


def at(place: str) -> None:
    """Note how far this process has come, for the others to know by."""
    if _meeting:
        _meeting.at(place)


def _gather(hosts: Hosts, facts: Mapping[str, Any], seconds: float) -> tuple[dict[int, str], dict[int, _Line]]:
    """As process 0, wait for all others; return the hosts' names and the lines to them. Raises: UserError."""
    names, lines = {0: socket.gethostname()}, {}
    try:
        server = socket.create_server(("", hosts.port))
    except OSError as error:
        raise UserError(
            f"process 0 on {names[0]} cannot listen on port {hosts.port} ({error.strerror}): another run may use it. Give "
            "--coordinator another port, the same for all."
        ) from None
    start, said = time.monotonic(), False
    came: list[_Line] = []
    problem = ""
    with server:
        while len(names) < hosts.processes and not problem:
            missing = [str(process) for process in range(hosts.processes) if process not in names]
            waiting = f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {hosts.processes}"
            left = start + seconds - time.monotonic()
            server.settimeout(max(0.001, left if said else min(left, _SAY_AFTER)))
            try:
                line = _Line(server.accept()[0])
                words = line.receive(_SAY_AFTER)
                problem = _differences(words, names, hosts.processes, facts)
                came.append(line)
                if not problem:
                    lines[words["process"]], names[words["process"]] = line, words["host"]
            except TimeoutError:
                if time.monotonic() - start >= seconds:
                    problem = (
                        f"process 0 on {names[0]} waited {seconds:g} s (--join_seconds) for {waiting}, which did not come. "
                        f"Start all of them with --coordinator={hosts.address}:{hosts.port}, or change --processes."
                    )
                elif not said:
                    print(f"process 0 on {names[0]} waits for {waiting} on port {hosts.port}.", file=sys.stderr)
                    said = True
            except (KeyError, TypeError, ValueError):
                continue  # A stranger: something that tries ports.
    for line in came:
        line.send(**({"end": 2, "why": problem} if problem else {"names": names}))
    if problem:
        raise UserError(problem)
    return names, lines


def _differences(words: Any, names: Mapping[int, str], processes: int, facts: Mapping[str, Any]) -> str:
    """Why a process cannot take part, in a sentence; "" where it can."""
    process, who = words["process"], f"process {words['process']} on {words['host']}"
    if words["processes"] != processes:
        return f"{who} was started as one of {words['processes']} processes, process 0 on {names[0]} as one of {processes}."
    if process in names:
        return f"{who} is there twice, also on {names[process]}: every process needs a --process of its own."
    theirs = words["facts"]
    differing = sorted(name for name in facts.keys() | theirs.keys() if facts.get(name) != theirs.get(name))
    changes = "; ".join(f"{name}: {theirs.get(name)!r} there, {facts.get(name)!r} here" for name in differing[:5])
    return f"{who} differs from process 0 on {names[0]} ({changes}): start all of them alike." if differing else ""


def _report(hosts: Hosts, facts: Mapping[str, Any], seconds: float) -> tuple[dict[int, str], dict[int, _Line]]:
    """As another process, go to process 0, and wait until all are there; see `_gather`. Raises: UserError."""
    name, end = socket.gethostname(), time.monotonic() + seconds
    who = f"process {hosts.process} of {hosts.processes} on {name}"
    line = _Line(_reach(hosts.address, hosts.port, who, seconds, end))
    line.send(process=hosts.process, processes=hosts.processes, host=name, facts=facts)
    try:
        # Process 0 knows better who is missing, and says so at its own end.
        words = line.receive(max(0.0, end - time.monotonic()) + _SAY_AFTER)
    except (TimeoutError, ValueError):
        raise UserError(
            f"{who} waited {seconds:g} s (--join_seconds) for process 0 to say that all are there."
        ) from None
    if words is None:
        raise UserError(f"{who} was waiting for the others when process 0 at {hosts.address}:{hosts.port} ended.")
    if "end" in words:
        raise UserError(words["why"])
    # JAX, where it cannot reach its service, ends by a stack trace.
    try:
        _reach(hosts.address, hosts.port + 1, who, seconds, time.monotonic() + seconds).close()
    except UserError as error:
        line.send(end=2, why=str(error))
        raise
    return {int(process): host for process, host in words["names"].items()}, {0: line}


def _reach(address: str, port: int, who: str, seconds: float, end: float) -> socket.socket:
    """Connect to process 0, which may not have begun to listen. Raises: UserError."""
    said = False
    while True:
        left = end - time.monotonic()
        try:
            return socket.create_connection((address, port), timeout=max(0.1, min(_SAY_AFTER, left)))
        except OSError as error:
            reason = error.strerror or str(error)
        if left <= 0:
            raise UserError(
                f"{who} waited {seconds:g} s (--join_seconds) for process 0 at {address}:{port} ({reason}). Is it started, is "
                "this its address, and is the port open between the hosts?"
            )
        if not said and left < seconds - _SAY_AFTER:
            print(f"{who} waits for process 0 at {address}:{port} ({reason}).", file=sys.stderr)
            said = True
        time.sleep(min(0.5, max(0.0, left)))
