"""Processes of one run on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.helpers.paths import ROOT

HERE = socket.gethostname()
# A limit for a process that hangs, as long as CI gives all quick tests together: how long a test takes depends on what else the
# machine does, and is not what it tests.
CHILD_SECONDS = 3600.0
# Runs the command behind it with the signals not ignored that are if the tests run in the background of a script or under nohup.
WITH_SIGNALS = [
    sys.executable,
    "-c",
    "import os, signal, sys; [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)]; "
    "os.execvp(sys.argv[1], sys.argv[1:])",
]


def with_devices(devices: int, *flags: str) -> dict[str, str]:
    """Return the environment of a process that has so many simulated devices, with more flags of XLA beside those of this one."""
    own = os.environ.get("XLA_FLAGS", "")
    return os.environ | {"XLA_FLAGS": " ".join([own, f"--xla_force_host_platform_device_count={devices}", *flags])}


def free_port() -> int:
    """Return a port that is free together with the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            first.bind(("", 0))
            port = first.getsockname()[1]
            second.bind(("", port + 1))
            return port


@contextlib.contextmanager
def starter() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Give a function that starts a module once for each list of arguments; all processes are killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start_all(
        module: str, arguments: Sequence[Sequence[str]], devices: int = 1, **environ: str
    ) -> list[subprocess.Popen[str]]:
        for own in arguments:
            command = [sys.executable, "-m", module, *own]
            environment = with_devices(devices) | environ
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True))
        return started[-len(arguments) :]

    try:
        yield start_all
    finally:
        for process in started:
            process.kill()
            process.wait()


def run_children(
    start: Callable[..., list[subprocess.Popen[str]]], event: str, processes: int, stall_seconds: int = 600
) -> tuple[list[int], list[tuple[str, str]]]:
    """Run `multihost_child` as several processes; return the exit code and the output of each that is not frozen."""
    port = free_port()
    arguments = [[event, *map(str, (number, processes, port, stall_seconds))] for number in range(processes)]
    children = start("tests.helpers.multihost_child", arguments)
    if event == "leader is frozen":
        children = children[1:]
    outputs = [child.communicate(timeout=CHILD_SECONDS) for child in children]
    return [child.returncode for child in children], outputs


def run_rpt(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command `rpt` in the directory `cwd`."""
    return subprocess.run(
        [sys.executable, "-m", "rpt_jax.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
