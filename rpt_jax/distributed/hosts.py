"""Detect the processes of a run from command-line flags, JAX's own variables, Slurm or the hosts of a TPU slice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from rpt_jax.errors import UserError

# The port on which process 0 listens unless configured otherwise. JAX's coordination service uses the next port.
PORT = 8476
_JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Hosts(NamedTuple):
    """This process's place among the processes of a run.

    Attributes:
      address: host name or IP address of process 0, as the other processes reach it.
      port: the port that process 0 listens on; JAX's coordination service uses the next one.
      processes: number of processes.
      process: index of this process, from 0.
    """

    address: str
    port: int
    processes: int
    process: int


def find_hosts(
    coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Hosts | None:
    """Return the processes of the run, or None for a single process.

    The flags take precedence over JAX's own variables, these over Slurm's, and these over those of a TPU slice.

    Args:
      coordinator: value of --coordinator, "HOST:PORT".
      processes: value of --processes.
      process: value of --process.
      environ: environment variables.

    Raises:
      UserError: a value is missing or out of range.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if any(value is not None for value in flags.values()):
        return _parse_hosts(flags)
    if any(environ.get(name) for name in _JAX_VARIABLES):
        return _parse_hosts({name: environ.get(name) for name in _JAX_VARIABLES})
    if _parse_int("SLURM_STEP_NUM_TASKS", environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _from_slurm(environ)
    return _from_tpu_slice(environ)


def _parse_hosts(values: Mapping[str, str | int | None]) -> Hosts | None:
    """Return the hosts that three named values describe, None for a single process.

    Args:
      values: the address of process 0, the number of processes and the index of this process, in this order, by the names
        to use in messages.

    Raises:
      UserError: a value is missing or out of range.
    """
    missing = [name for name, value in values.items() if value in (None, "")]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given as well: {', '.join(values)} are required together.",
            field=missing[0],
        )
    address_name, processes_name, process_name = values
    address = values[address_name]
    processes = _parse_int(processes_name, values[processes_name])
    process = _parse_int(process_name, values[process_name])

    host, colon, port = str(address).rpartition(":")
    if not colon:
        host = port
        port = str(PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(
            f"{address_name}={address} must be HOST:PORT of process 0, with a port from 1 to 65534.", field=address_name
        )
    if processes < 1:
        raise UserError(f"{processes_name}={processes} must be at least 1.", field=processes_name)
    if not 0 <= process < processes:
        raise UserError(
            f"{process_name}={process} must be from 0 to {processes - 1}, because {processes_name}={processes}.",
            field=process_name,
        )
    if processes == 1:
        return None
    return Hosts(address=host, port=int(port), processes=processes, process=process)


def _parse_int(name: str, value: str | int | None) -> int:
    """Return the integer value of a flag or a variable, 0 if it is not set. Raises: UserError."""
    try:
        return int(value or 0)
    except ValueError:
        raise UserError(f"{name}={value} must be an integer.", field=name) from None


def _from_slurm(environ: Mapping[str, str]) -> Hosts | None:
    """Return the tasks of an `srun` step. Process 0 runs on its first node, on a port derived from the job id.

    Two jobs that share a node thus use different ports.
    """
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    first_node = re.match(r"[^,\[]+(\[\d+)?", nodes)  # "node003" for "node[003-007,12],other".
    port = 20000 + 2 * (_parse_int("SLURM_JOB_ID", environ.get("SLURM_JOB_ID")) % 20000)
    return _parse_hosts(
        {
            "SLURM_STEP_NODELIST": f"{first_node[0].replace('[', '')}:{port}" if first_node else None,
            "SLURM_STEP_NUM_TASKS": environ["SLURM_STEP_NUM_TASKS"],
            "SLURM_PROCID": environ.get("SLURM_PROCID"),
        }
    )


def _from_tpu_slice(environ: Mapping[str, str]) -> Hosts | None:
    """Return the hosts of one TPU slice or of several (multislice), as Google Kubernetes Engine names them."""
    names = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = _parse_int("MEGASCALE_NUM_SLICES", environ.get("MEGASCALE_NUM_SLICES") or 1)
    if len(names) * slices < 2:
        return None
    if slices > 1:
        address_name = "MEGASCALE_COORDINATOR_ADDRESS"
        address = environ.get(address_name, "")
    else:
        address_name = "TPU_WORKER_HOSTNAMES"
        address = names[0]
    first_in_slice = _parse_int("MEGASCALE_SLICE_ID", environ.get("MEGASCALE_SLICE_ID")) * len(names)
    worker = environ.get("TPU_WORKER_ID")
    return _parse_hosts(
        {
            address_name: address.partition(":")[0],
            "MEGASCALE_NUM_SLICES × TPU_WORKER_HOSTNAMES": slices * len(names),
            "TPU_WORKER_ID": first_in_slice + _parse_int("TPU_WORKER_ID", worker) if worker else None,
        }
    )
