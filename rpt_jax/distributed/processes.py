"""The JAX processes of a run: which one leads, barriers, and values that all of them need."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


def is_leader() -> bool:
    """Return whether this is process 0, the one that writes shared files."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Block until every process has reached the barrier `name`."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(name)


def in_any_process(flag: bool) -> bool:
    """Return whether `flag` is true in at least one process. A collective: every process must call it."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.process_allgather(np.array(flag)).any())


def least_of_all(value: int) -> int:
    """Return the least `value` of all processes, below 2^31. A collective: every process must call it."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return int(multihost_utils.process_allgather(np.array(value, np.int32)).min())


def to_host(tree: Any) -> Any:
    """Return the global arrays of `tree` as NumPy arrays in every process. A collective: every process must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def replicate(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))

    return jax.device_get(jax.tree.map(replicate, tree))


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Return the rows of all processes, in the order of the processes. A collective: every process must call it with as many."""
    if jax.process_count() == 1:
        return rows
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(rows, tiled=True))
