"""Detect the processes of a run from command-line flags, JAX's own variables, Slurm or the hosts of a TPU slice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from rpt_jax.errors import UserError

# The port on which process 0 listens unless configured otherwise. JAX's coordination service uses the next port.
PORT = 8476


class Names(NamedTuple):
    """Where the values of `Hosts` come from: flags or environment variables, to be named in messages."""

    address: str
    processes: str
    process: str


_FLAGS = Names("--coordinator", "--processes", "--process")
_JAX = Names("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = Names("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
_TPU_SLICE = Names("TPU_WORKER_HOSTNAMES", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
_TPU_SLICES = Names("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES × TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")


class Hosts(NamedTuple):
    """This process's place among the processes of a run.

    Attributes:
      address: host name or IP address of process 0, as the other processes reach it.
      port: the port that process 0 listens on; JAX's coordination service uses the next one.
      processes: number of processes.
      process: index of this process, from 0.
      local_devices: indices of the GPUs of its host that this process uses; None for all that it sees.
      names: where address, processes and process come from.
    """

    address: str
    port: int
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None
    names: Names = _FLAGS


def find_hosts(
    coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Hosts | None:
    """Return the processes of the run, or None for a single process.

    Each flag takes precedence over the environment, where JAX's own variables take precedence over Slurm's, and these over those
    of a TPU slice.

    Args:
      coordinator: value of --coordinator, "HOST:PORT".
      processes: value of --processes.
      process: value of --process.
      environ: environment variables.

    Raises:
      UserError: a value is missing or out of range.
    """
    flags = _Values(coordinator, processes, process)
    names, values = _FLAGS, flags
    if None in flags:
        names, values = _from_environment(environ)
        is_given = [flag is not None for flag in flags]
        names = Names(*(new if given else old for given, new, old in zip(is_given, _FLAGS, names, strict=True)))
        values = _Values(*(new if given else old for given, new, old in zip(is_given, flags, values, strict=True)))
    hosts = _parse_hosts(names, values)
    return hosts and hosts._replace(local_devices=_local_devices(environ))


class _Values(NamedTuple):
    """The values of `Hosts` before they are parsed; None for those that are not given."""

    address: str | int | None
    processes: str | int | None
    process: str | int | None


def _from_environment(environ: Mapping[str, str]) -> tuple[Names, _Values]:
    """Return what the environment says of the processes of the run; flags without values if it says nothing."""
    if any(environ.get(name) for name in _JAX):
        return _JAX, _Values(*map(environ.get, _JAX))
    if _parse_int(_SLURM.processes, environ.get(_SLURM.processes) or 1) > 1:
        return _SLURM, _Values(_slurm_address(environ), environ[_SLURM.processes], environ.get(_SLURM.process))
    return _from_tpu_slice(environ)


def _parse_hosts(names: Names, values: _Values) -> Hosts | None:
    """Return the hosts that the named values describe, None for a single process or if no value is given.

    Raises:
      UserError: a value is missing or out of range.
    """
    missing = [name for name, value in zip(names, values, strict=True) if value in (None, "")]
    if len(missing) == len(values):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given as well: {', '.join(names)} are required together.",
            field=missing[0],
        )
    processes = _parse_int(names.processes, values.processes)
    process = _parse_int(names.process, values.process)

    host, colon, port = str(values.address).rpartition(":")
    if not colon:
        host = port
        port = str(PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(
            f"{names.address}={values.address} must be HOST:PORT of process 0, with a port from 1 to 65534.",
            field=names.address,
        )
    if processes < 1:
        raise UserError(f"{names.processes}={processes} must be at least 1.", field=names.processes)
    if not 0 <= process < processes:
        raise UserError(
            f"{names.process}={process} must be from 0 to {processes - 1}, because {names.processes}={processes}.",
            field=names.process,
        )
    if processes == 1:
        return None
    return Hosts(address=host, port=int(port), processes=processes, process=process, names=names)


def _parse_int(name: str, value: str | int | None) -> int:
    """Return the integer value of a flag or a variable, 0 if it is not set. Raises: UserError."""
    # `int` would also accept "41_3", the way in which Slurm writes a task of a job array.
    if not re.fullmatch(r"-?\d+", str(value or 0)):
        raise UserError(f"{name}={value} must be an integer.", field=name)
    return int(value or 0)


def _local_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the GPUs of its host that this process uses, None for all that it sees. Raises: UserError."""
    name = "JAX_LOCAL_DEVICE_IDS"
    if chosen := environ.get(name):
        return tuple(_parse_int(name, device) for device in chosen.split(","))
    return _slurm_local_devices(environ)


# --- Slurm -----------------------------------------------------------------------------------------


def _slurm_address(environ: Mapping[str, str]) -> str | None:
    """Return "HOST:PORT" of the first node of an `srun` step, which runs process 0; None if Slurm does not name it.

    The port is derived from the job id, so two jobs that share a node use different ports. Raises: UserError.
    """
    nodes = environ.get(_SLURM.address)
    if not nodes:
        return None
    # "rack0[1-2]n[003-007,12],other" begins with node rack01n003.
    first_node = re.match(r"[^,\[\]]+(?:\[\d[^\[\]]*\][^,\[\]]*)*(?=,|$)", nodes)
    if not first_node:
        raise UserError(
            f"{_SLURM.address}={nodes} must be a list of nodes, as in node[003-007],other.", field=_SLURM.address
        )
    port = 20000 + 2 * (_parse_int("SLURM_JOB_ID", environ.get("SLURM_JOB_ID")) % 20000)
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first_node[0])
    return f"{name}:{port}"


def _slurm_local_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the GPUs that a task of an `srun` step uses, None for all that it sees.

    A task that is alone on its node uses all GPUs. Several tasks of a node divide the GPUs that all of them see. Where Slurm does
    not say how many there are, each uses one, as in JAX.

    Raises:
      UserError: a variable of Slurm is malformed, or the GPUs cannot be divided evenly.
    """
    tasks = _tasks_on_node(environ)
    if tasks < 2:
        return None
    local = _parse_int("SLURM_LOCALID", environ.get("SLURM_LOCALID"))
    visible = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    if not visible:
        return (local,)
    gpus = visible.count(",") + 1
    is_bound = gpus == 1 or gpus < _parse_int("SLURM_GPUS_ON_NODE", environ.get("SLURM_GPUS_ON_NODE"))
    if is_bound:
        return None  # Slurm has assigned separate GPUs to each task.
    if gpus % tasks:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE: {tasks} tasks on a node cannot divide its {gpus} GPUs evenly; the nearest number of "
            f"tasks that can is {max(n for n in range(1, tasks) if gpus % n == 0)} (srun --ntasks-per-node).",
            field="SLURM_STEP_TASKS_PER_NODE",
        )
    share = gpus // tasks
    return tuple(range(local * share, (local + 1) * share))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Return the number of tasks of the `srun` step on this node, 1 outside of a step. Raises: UserError."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not text:
        return 1
    # "2(x3),1": two tasks on each of three nodes, and one on the fourth.
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    counts = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    node = _parse_int("SLURM_NODEID", environ.get("SLURM_NODEID"))
    if None in parts or not 0 <= node < len(counts):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={text} must be the number of tasks of each node, as in 2(x3),1, with one for node "
            f"SLURM_NODEID={node}.",
            field="SLURM_STEP_TASKS_PER_NODE",
        )
    return counts[node]


# --- TPU slices ------------------------------------------------------------------------------------


def _from_tpu_slice(environ: Mapping[str, str]) -> tuple[Names, _Values]:
    """Return the hosts of one TPU slice or of several (multislice), as Google Kubernetes Engine names them."""
    hosts = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = _parse_int("MEGASCALE_NUM_SLICES", environ.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices < 2:
        return _FLAGS, _Values(None, None, None)
    names = _TPU_SLICES if slices > 1 else _TPU_SLICE
    address = environ.get(names.address, "") if slices > 1 else hosts[0]
    worker = environ.get(names.process)
    first_in_slice = _parse_int("MEGASCALE_SLICE_ID", environ.get("MEGASCALE_SLICE_ID")) * len(hosts)
    process = first_in_slice + _parse_int(names.process, worker) if worker else None
    return names, _Values(address.partition(":")[0], slices * len(hosts), process)
