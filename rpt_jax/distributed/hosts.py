"""Which processes a run has, on one host or on many: by the command's flags, or by what a scheduler says in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from rpt_jax.errors import UserError

PORT = 8476  # Where process 0 listens, unless something says otherwise; the port after it is JAX's.
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Hosts(NamedTuple):
    """One process among several.

    Attributes:
      address: host name or address of process 0, as the others reach it.
      port: where it listens; the next one is JAX's.
    """

    address: str
    port: int
    processes: int
    process: int


def find_hosts(
    coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Hosts | None:
    """Return what the flags say or, without any, JAX's own variables, Slurm's or those of a TPU's hosts; None: one process.

    Raises: UserError, where something is missing or out of range, with its name.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if any(value is not None for value in flags.values()):
        return _hosts(flags)
    if any(environ.get(name) for name in _JAX):
        return _hosts({name: environ.get(name) for name in _JAX})
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _slurm(environ)
    return _tpu(environ)


def _hosts(values: Mapping[str, str | int | None]) -> Hosts | None:
    """From names and values of the address, the number of processes and which one this is, in that order."""
    if missing := [name for name, value in values.items() if value in (None, "")]:
        raise UserError(f"{' and '.join(missing)} must be given as well: {', '.join(values)} belong together.")
    (at, address), (of, processes), (number, process) = values.items()
    processes, process = _whole(of, processes), _whole(number, process)
    host, colon, port = str(address).rpartition(":")
    if not colon:
        host, port = port, str(PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(f"{at}={address} must be HOST:PORT of process 0, with a port from 1 to 65534.")
    if processes < 1:
        raise UserError(f"{of}={processes} must be at least 1.")
    if not 0 <= process < processes:
        raise UserError(f"{number}={process} must be from 0 to {processes - 1}: {of}={processes}.")
    return Hosts(host, int(port), processes, process) if processes > 1 else None


def _whole(name: str, value: str | int | None) -> int:
    try:
        return int(value or 0)
    except ValueError:
        raise UserError(f"{name}={value} must be a whole number.") from None


def _slurm(environ: Mapping[str, str]) -> Hosts | None:
    """A step of `srun`: its first node has process 0. Two jobs on one node get ports of their own."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"[^,\[]+(\[\d+)?", nodes)  # Of node[003-007,12],other: node003.
    port = 20000 + 2 * (int(environ.get("SLURM_JOB_ID") or 0) % 20000)
    return _hosts(
        {
            "SLURM_STEP_NODELIST": f"{first[0].replace('[', '')}:{port}" if first else None,
            "SLURM_STEP_NUM_TASKS": environ["SLURM_STEP_NUM_TASKS"],
            "SLURM_PROCID": environ.get("SLURM_PROCID"),
        }
    )


def _tpu(environ: Mapping[str, str]) -> Hosts | None:
    """The hosts of a TPU slice, or of several slices, as Kubernetes engines name them."""
    names = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = _whole("MEGASCALE_NUM_SLICES", environ.get("MEGASCALE_NUM_SLICES") or 1)
    if len(names) * slices < 2:
        return None
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "") if slices > 1 else names[0]
    before = _whole("MEGASCALE_SLICE_ID", environ.get("MEGASCALE_SLICE_ID")) * len(names)
    worker = environ.get("TPU_WORKER_ID")
    return _hosts(
        {
            "MEGASCALE_COORDINATOR_ADDRESS" if slices > 1 else "TPU_WORKER_HOSTNAMES": first.partition(":")[0],
            "MEGASCALE_NUM_SLICES × TPU_WORKER_HOSTNAMES": slices * len(names),
            "TPU_WORKER_ID": before + _whole("TPU_WORKER_ID", worker) if worker else None,
        }
    )
