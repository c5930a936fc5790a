"""The device mesh, and the two tables that map logical axes to mesh axes.

Model code never names a device axis. It annotates arrays with *logical* axes ("width", "kv_heads", "prompt", ...), and a table
maps each of them to the mesh axes that it is split over. A different layout is a different table; the model stays as it is.

There are two tables because the two phases of a step want different layouts:

* `TRAINING`: fully sharded data parallelism (FSDP) plus tensor parallelism. Parameters and optimizer state are split over as
  many devices as possible and are all-gathered layer by layer.
* `DECODING`: one forward pass per generated token reads every parameter once. All-gathering them for each token would dominate
  the time of a rollout, so each tensor-parallel group holds a complete replica, and prompts are split over the replicas.

The tensor-parallel size of rollouts (`mesh.rollout_tensor`) may differ from that of training (`mesh.tensor`). Two mesh axes
exist for that. At most one of them is larger than 1:

* "fsdp_to_tp" is a part of FSDP in training and of tensor parallelism in rollouts (rollout_tensor > tensor);
* "tp_to_dp" is a part of tensor parallelism in training and of data parallelism in rollouts (rollout_tensor < tensor).

Who holds what on four devices (W1 to W4: quarters of the width of each parameter; H1, H2: halves of its heads):

    mesh.fsdp=4, tensor=1, rollout_tensor=2       ->  mesh axes fsdp=2, fsdp_to_tp=2

               training                        rollouts
    device 0   W1, all heads, batch 1/4        all width, H1, replica 0 (prompts 1/2)
    device 1   W2, all heads, batch 2/4        all width, H2, replica 0
    device 2   W3, all heads, batch 3/4        all width, H1, replica 1 (prompts 2/2)
    device 3   W4, all heads, batch 4/4        all width, H2, replica 1

    mesh.fsdp=2, tensor=2, rollout_tensor=1       ->  mesh axes fsdp=2, tp_to_dp=2

               training                        rollouts
    device 0   W1 W2, H1, batch 1/2            everything, replica 0 (prompts 1/4)
    device 1   W1 W2, H2, batch 1/2            everything, replica 1 (prompts 2/4)
    device 2   W3 W4, H1, batch 2/2            everything, replica 2 (prompts 3/4)
    device 3   W3 W4, H2, batch 2/2            everything, replica 3 (prompts 4/4)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from rpt_jax.errors import UserError

# The mesh axes that one logical axis is split over.
Axes = str | tuple[str, ...] | None

MESH_AXES = ("data", "fsdp", "fsdp_to_tp", "tp_to_dp", "tensor")
# With explicit axes, the default of jax.make_mesh, the embedding look-up is an error.
_AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

# "fsdp_to_tp" and "tp_to_dp" come after "tensor" in the tuples below, so that the shard of a device in training is a slice of its
# shard in rollouts: resharding then moves each slice at most once.
TRAINING: dict[str, Axes] = {
    "prompt": ("data", "fsdp", "fsdp_to_tp"),
    "width": ("fsdp", "fsdp_to_tp"),
    "kv_heads": ("tensor", "tp_to_dp"),
    "ffn": ("tensor", "tp_to_dp"),
    "experts": ("tensor", "tp_to_dp"),
    "vocab": ("tensor", "tp_to_dp"),
    "layers": None,
    "sequence": None,  # `use_mesh(split_rows=True)` splits it as "kv_heads" is (sequence parallelism).
}
DECODING: dict[str, Axes] = {
    "prompt": ("data", "fsdp", "tp_to_dp"),
    "width": None,
    "kv_heads": ("tensor", "fsdp_to_tp"),
    "ffn": ("tensor", "fsdp_to_tp"),
    "experts": ("tensor", "fsdp_to_tp"),
    "vocab": ("tensor", "fsdp_to_tp"),
    "layers": None,
    "sequence": None,
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None, rollout_tensor: int = 0) -> Mesh:
    """Arrange devices as a mesh of data × fsdp × tensor.

    Args:
      data: number of FSDP groups. One of the three sizes may be -1 for all devices that are left.
      fsdp: devices that parameters and optimizer state are split over.
      tensor: tensor-parallel size in training.
      devices: the `jax.Device`s to arrange; None for those of all processes.
      rollout_tensor: tensor-parallel size in rollouts; 0 for `tensor`. The devices of such a group are neighbors and, where
        possible, belong to one host.

    Returns:
      A mesh with the axes `MESH_AXES`. Several TPU slices are split over data and, if there are more slices, over fsdp.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `rollout_tensor` or TPU slices do not fit them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))

    rollout_tensor = rollout_tensor or sizes["tensor"]
    shape = _axis_sizes(**sizes, rollout_tensor=rollout_tensor)
    return Mesh(_arrange_slices(shape, devices, rollout_tensor), MESH_AXES, axis_types=_AXIS_TYPES)


def make_abstract_mesh(data: int, fsdp: int, tensor: int, rollout_tensor: int) -> AbstractMesh:
    """Return the mesh of `make_mesh` without devices. Raises: UserError, if `rollout_tensor` does not fit the other sizes."""
    return AbstractMesh(_axis_sizes(data, fsdp, tensor, rollout_tensor), MESH_AXES, axis_types=_AXIS_TYPES)


def _axis_sizes(data: int, fsdp: int, tensor: int, rollout_tensor: int) -> tuple[int, ...]:
    """Return the sizes of `MESH_AXES`, with the axis that changes its role between training and rollouts split off."""
    fsdp_to_tp, tp_to_dp = resharding_axis_sizes(fsdp, tensor, rollout_tensor)
    return data, fsdp // fsdp_to_tp, fsdp_to_tp, tp_to_dp, tensor // tp_to_dp


def resolve_sizes(sizes: Mapping[str, int], devices: int, *, exact: bool = True) -> dict[str, int]:
    """Return the sizes of data, fsdp and tensor with -1 replaced by what the others leave, at least 1.

    Args:
      sizes: by name; one of them may be -1.
      devices: number of devices.
      exact: refuse sizes that do not multiply to `devices`.

    Raises:
      UserError: the sizes do not fit; the message gives the nearest ones that do.
    """
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    resolved = {name: max(1, devices // max(known, 1)) if size == -1 else size for name, size in sizes.items()}
    fits = math.prod(resolved.values()) == devices if exact else min(resolved.values()) > 0
    if len(free) < 2 and fits:
        return resolved

    # Complete the nearest mesh: each size becomes the largest divisor of the devices left that does not exceed it.
    left = devices
    fitting: dict[str, int] = {}
    for name in ("tensor", "fsdp", "data"):
        size = 1 if sizes[name] == -1 else sizes[name]
        fitting[name] = max(n for n in range(1, max(size, 1) + 1) if left % n == 0)
        left //= fitting[name]
    fitting[free[0] if free else "data"] *= left

    requested, nearest = (", ".join(f"mesh.{name}={values[name]}" for name in sizes) for values in (sizes, fitting))
    expected = f"a multiple of {known} devices" if free else f"{known} devices"
    different = next(
        name for name in ("tensor", "fsdp", "data") if sizes[name] not in (-1, fitting[name]) or name in free[1:]
    )
    raise UserError(
        f"{requested} does not fit {devices} device{'s' * (devices > 1)}: expected {expected}, with at most one size of -1. The "
        f"nearest mesh that fits is {nearest}.",
        field=f"mesh.{different}",
    )


def rollout_tensor_sizes(fsdp: int, tensor: int) -> list[int]:
    """Return the values of `mesh.rollout_tensor` that fit a training layout, in ascending order."""
    smaller = [size for size in range(1, tensor + 1) if tensor % size == 0]
    larger = [tensor * factor for factor in range(2, fsdp + 1) if fsdp % factor == 0]
    return smaller + larger


def resharding_axis_sizes(fsdp: int, tensor: int, rollout_tensor: int) -> tuple[int, int]:
    """Return the sizes of the mesh axes "fsdp_to_tp" and "tp_to_dp".

    Raises:
      UserError: `rollout_tensor` neither divides `tensor` nor is a multiple of it that divides fsdp × tensor.
    """
    sizes = rollout_tensor_sizes(fsdp, tensor)
    if rollout_tensor not in sizes:
        nearest = min(sizes, key=lambda size: abs(size - rollout_tensor))
        raise UserError(
            f"mesh.rollout_tensor={rollout_tensor} must divide mesh.tensor={tensor}, or be a multiple of it that divides "
            f"mesh.fsdp × mesh.tensor = {fsdp * tensor}; the nearest size that does is {nearest}.",
            field="mesh.rollout_tensor",
        )
    return max(1, rollout_tensor // tensor), max(1, tensor // rollout_tensor)


def _arrange_slices(sizes: tuple[int, ...], devices: Sequence[Any], rollout_tensor: int) -> np.ndarray:
    """Return an array of devices in which only the axes "data" and "fsdp" are split over TPU slices.

    The network between slices is slow. Raises: UserError, if the sizes of these axes do not allow it.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # On other platforms, a slice is what a fast network connects, and JAX arranges it itself.
        is_tpu = getattr(device, "platform", "") == "tpu"
        slices.setdefault(getattr(device, "slice_index", 0) if is_tpu else 0, []).append(device)
    data, fsdp, *others = sizes
    over_data = math.gcd(data, len(slices))
    over_fsdp = len(slices) // over_data
    if fsdp % over_fsdp:
        raise UserError(
            f"mesh.data={data} does not fit {len(slices)} TPU slices: mesh.data × mesh.fsdp must be split evenly over them. "
            f"Choose mesh.data={len(slices)} and sizes of the others that fit a slice of {len(devices) // len(slices)} chips.",
            field="mesh.data",
        )
    in_slice = (data // over_data, fsdp // over_fsdp, *others)
    arranged = np.array([_arrange_devices(in_slice, slices[index], rollout_tensor) for index in sorted(slices)])
    return np.moveaxis(arranged.reshape(over_data, over_fsdp, *in_slice), 1, 2).reshape(sizes)


def _arrange_devices(sizes: tuple[int, ...], devices: Sequence[Any], rollout_tensor: int) -> np.ndarray:
    """Return an array of the devices of a slice in which neighbors on a mesh axis are neighbors in the network.

    That order may put a rollout group on several hosts. If ordering the devices by host avoids this, order them by host.
    """
    try:
        by_network = mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        # A mesh axis is not a product of whole network axes (8 chips of a 4×4×4 cube): let it take a part of one.
        by_network = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    by_host = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(sizes)
    if _hosts_per_group(by_network, rollout_tensor) > 1 == _hosts_per_group(by_host, rollout_tensor):
        return by_host
    return by_network


def _hosts_per_group(mesh: np.ndarray, group_size: int) -> int:
    """Return the largest number of hosts that a group of `group_size` neighboring devices belongs to."""
    return max(len({device.process_index for device in group}) for group in mesh.reshape(-1, group_size))


def mesh_fields(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Return the fields of config section `mesh` (data, fsdp, tensor, rollout_tensor) that produce `mesh`."""
    data = mesh.shape["data"]
    return {
        "data": data,
        "fsdp": num_batch_shards(mesh) // data,
        "tensor": num_shards(mesh, TRAINING["kv_heads"]),
        "rollout_tensor": num_shards(mesh, DECODING["kv_heads"]),
    }


def num_shards(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    """Return the number of shards of an array axis that is split over the mesh axes `axes`."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def num_batch_shards(mesh: Mesh | AbstractMesh, table: Mapping[str, Axes] = TRAINING) -> int:
    """Return the number of shards that the batch of a phase is split into."""
    return num_shards(mesh, table["prompt"])


def check_batches(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int], table: Mapping[str, Axes] = TRAINING) -> None:
    """Check that batches split evenly over the mesh in a phase.

    Args:
      mesh: the mesh of the run.
      sizes: the batch size of each config field to check.
      table: `TRAINING` or `DECODING`.

    Raises:
      UserError: a size is not a multiple of the number of batch shards; the message gives the nearest size that is.
    """
    shards = num_batch_shards(mesh, table)
    formula = "devices / mesh.rollout_tensor" if table is DECODING else "mesh.data × mesh.fsdp"
    for name, size in sizes.items():
        if size % shards:
            nearest = max(1, round(size / shards)) * shards
            raise UserError(
                f"{name}={size} must be a multiple of {formula} = {shards}; the nearest one is {nearest}.", field=name
            )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, split_rows: bool = False) -> Iterator[None]:
    """Make `mesh` the current mesh, and `TRAINING` the table of logical axes.

    Args:
      mesh: the mesh of the run.
      split_rows: sequence parallelism. Between two matrix products, the tokens of an update's row are split over the devices of
        a tensor-parallel group.
    """
    rows = {"sequence": TRAINING["kv_heads"]} if split_rows else {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple((TRAINING | rows).items())):
        yield


@contextlib.contextmanager
def in_one_replica() -> Iterator[None]:
    """Make `DECODING` the table of logical axes inside one replica, where the prompt axis is not split."""
    if jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with nn.logical_axis_rules(tuple((DECODING | {"prompt": None}).items())):
        yield


def prompt_axes(table: Mapping[str, Axes]) -> tuple[str, ...]:
    """Return the axes of the current mesh that a phase splits its batch over, without those of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = table["prompt"] or ()
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
