"""A small Slurm on this machine: a controller and two simulated nodes. It needs no configuration, no munge and no root."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.launchers import wait_until
from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port

# Debian installs the daemons where only root's PATH looks.
PATH = f"{os.environ['PATH']}:/usr/sbin"

# Both nodes are this machine. Process 0 runs on the first one, whose name must be one that this machine can look up.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=2
NodeName={host}-b NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    """A running Slurm.

    Attributes:
      nodes: the names of its nodes.
      environ: the environment of its commands.
    """

    def __init__(self, directory: Path, nodes: tuple[str, str]) -> None:
        self.nodes = nodes
        self.environ = os.environ | {"PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf")}

    def call(self, *command: str, **environ: str) -> str:
        """Run one of Slurm's commands in the repository root; return its output."""
        result = subprocess.run(
            command, cwd=ROOT, env=self.environ | environ, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def submit(self, *arguments: str, **environ: str) -> str:
        """Submit a batch script; return the number of the job."""
        return self.call("sbatch", "--parsable", *arguments, **environ).strip()

    def job(self, job: str) -> Mapping[str, str]:
        """Return what Slurm says of a job, such as JobState, Restarts and ExitCode."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))


@contextlib.contextmanager
def running_slurm(directory: Path) -> Iterator[Slurm]:
    """Start a controller and two nodes in an empty directory, and stop them and their jobs at the end.

    Skips the test if Slurm is not installed.
    """
    if shutil.which("slurmctld", path=PATH) is None:
        pytest.skip(
            "Slurm is not installed: on Debian and Ubuntu, `apt-get install slurm-wlm` (it needs no configuration)"
        )
    host = socket.gethostname().partition(".")[0]
    ports = {name: free_port() for name in ("port", "first_port", "second_port")}
    (directory / "state").mkdir()
    (directory / "slurm.conf").write_text(
        CONFIG.format(host=host, user=getpass.getuser(), directory=directory, **ports)
    )
    slurm = Slurm(directory, (host, f"{host}-b"))
    daemons = []
    try:
        for name, *options in (["slurmctld"], *(["slurmd", "-N", node] for node in slurm.nodes)):
            log = (directory / f"{'-'.join([name, *options[1:]])}.log").open("w")
            command = [str(shutil.which(name, path=PATH)), "-D", "-f", str(directory / "slurm.conf"), *options]
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
        wait_until(lambda: slurm_is_idle(slurm), f"idle nodes, see the logs in {directory}")
        try:
            yield slurm
        finally:
            slurm.call("scancel", "--user", getpass.getuser())
            wait_until(lambda: not slurm.call("squeue", "--noheader"), "the end of all jobs")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def slurm_is_idle(slurm: Slurm) -> bool:
    """Return whether the controller answers and all nodes are idle."""
    with contextlib.suppress(AssertionError):
        return slurm.call("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(slurm.nodes)
    return False


def make_environment(directory: Path) -> None:
    """Make an environment for the launchers (RPT_VENV) that shares the packages of this interpreter."""
    venv.create(directory, symlinks=True)
    [packages] = directory.glob("lib/python3*/site-packages")
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    requirements = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    (directory / "requirements.stamp").write_text("python{}.{} {}\n".format(*sys.version_info[:2], requirements))
