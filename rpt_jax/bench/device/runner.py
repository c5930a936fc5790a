"""Runs the parts of a measurement one after the other, each in a separate process with a time limit.

Whatever happens to a part, the others run, and what it measured before is kept: figures are written to a file as they come.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.infra.atomic_write import atomic_write

COMPLETE = "complete"
FAILED = "failed"
TIME_LIMIT = "time limit"
NOT_STARTED = "not started"
INTERRUPTED = "interrupted"

# A part is not started with less time than this: it takes about as long to start Python and JAX.
_SHORTEST_SECONDS = 10.0
# How long a process may take to die after it was killed. A device works on until the program that it runs has ended.
_KILL_SECONDS = 20.0
_LOG_LINES = 15  # Of the log of a part that did not complete, kept with its figures.


class Part(NamedTuple):
    """A part of the measurement.

    Attributes:
      name: of the part.
      weight: its share of the time that is left when it starts, relative to the parts after it.
      command: starts its process. The descriptor that messages are written to is added as the last argument.
    """

    name: str
    weight: float
    command: tuple[str, ...]


class Record:
    """The JSON file with everything that was measured so far. Every change is written at once.

    Args:
      path: of the file.
      conditions: first entries of the file, such as machine and date.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]):
        self._path = path
        self.content: dict[str, Any] = {**conditions, "parts": {}}
        self.save()

    def part(self, name: str) -> dict[str, Any]:
        """Return the entry of a part."""
        empty = {"status": NOT_STARTED, "seconds": 0.0, "limit_seconds": 0.0, "figures": [], "notes": []}
        return self.content["parts"].setdefault(name, empty)

    def save(self) -> None:
        """Write the file. A process that is killed leaves either the old file or the complete new one."""
        atomic_write(self._path, json.dumps(self.content, indent=1) + "\n")


def run_parts(
    parts: Sequence[Part],
    seconds: float,
    record: Record,
    log: Path,
    environment: Mapping[str, str],
    show: Callable[[str, Mapping[str, Any]], None] = lambda part, message: None,
) -> None:
    """Run the parts in their order.

    Args:
      parts: to run.
      seconds: for all parts together.
      record: filled and written as messages come.
      log: file that the output of the processes is appended to.
      environment: variables of the processes.
      show: is called with the name of a part and each of its messages.
    """
    deadline = time.monotonic() + seconds
    for part in parts:
        record.part(part.name)
    record.save()
    for index, part in enumerate(parts):
        left = deadline - time.monotonic()
        entry = record.part(part.name)
        if left < min(_SHORTEST_SECONDS, seconds / 2):
            entry["notes"].append(f"not started: {max(left, 0.0):.0f} s of {seconds:.0f} s were left")
            record.save()
            continue
        # What a part leaves over is divided among those after it.
        limit = left * part.weight / sum(later.weight for later in parts[index:])
        entry |= {"status": INTERRUPTED, "limit_seconds": round(limit, 1)}
        record.save()
        start = time.monotonic()
        entry["status"] = _run_part(part, limit, record, log, environment, show)
        entry["seconds"] = round(time.monotonic() - start, 1)
        record.save()


def _run_part(
    part: Part,
    limit: float,
    record: Record,
    log: Path,
    environment: Mapping[str, str],
    show: Callable[[str, Mapping[str, Any]], None],
) -> str:
    """Run one part and return its status."""
    reader, writer = os.pipe()
    log_start = log.stat().st_size if log.exists() else 0
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        output = stack.enter_context(log.open("ab"))
        try:
            # Its own group, to end it with everything that it has started. It ends by itself when its input is closed, so that
            # it does not outlive this process.
            process = subprocess.Popen(
                [*part.command, str(writer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(environment),
                pass_fds=(writer,),
                process_group=0,
            )
        finally:
            os.close(writer)
        stack.callback(_end, process)
        if _read_messages(reader, limit, part.name, record, show):
            try:
                code = process.wait(_KILL_SECONDS)  # It has closed its messages, so it is about to end.
            except subprocess.TimeoutExpired:
                code = f"none {_KILL_SECONDS:.0f} s after its last message"
            if code == 0:
                return COMPLETE
            status = FAILED
            reason = f"the process ended with code {code}"
        else:
            status = TIME_LIMIT
            reason = "ended at its time limit"
    lines = log.read_bytes()[log_start:].decode(errors="replace").splitlines()[-_LOG_LINES:]
    record.part(part.name)["notes"].append("\n".join([f"{reason}. Its last lines:", *lines] if lines else [reason]))
    return status


def _read_messages(
    reader: int, limit: float, name: str, record: Record, show: Callable[[str, Mapping[str, Any]], None]
) -> bool:
    """Record messages until the process closes its end, and return True, or until the time limit, and return False."""
    deadline = time.monotonic() + limit
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            received = os.read(reader, 2**16)
            if not received:
                return True
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                message = json.loads(line)
                _add_message(record, name, message)
                show(name, message)
    return False


def _add_message(record: Record, name: str, message: Mapping[str, Any]) -> None:
    entry = record.part(name)
    if "figure" in message:
        entry["figures"].append(message["figure"])
    if "note" in message:
        entry["notes"].append(message["note"])
    if "machine" in message:
        entry["machine"] = message["machine"]
    record.save()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin:
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)
