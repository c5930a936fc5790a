"""Where arrays live: logical axes of the policy and the batch, mapped to axes of the mesh in one table a phase."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rpt_jax.errors import UserError

Axes = str | tuple[str, ...] | None
# Of the mesh. "gather" is a part of fsdp in training and of tensor in decoding, "spread" a part of tensor in training and of
# the replicas in decoding: one of them is 1, and both are where the two phases split the policy alike. They come after tensor,
# so that what a device holds in one phase is a part of what it holds in the other.
MESH_AXES = ("data", "fsdp", "gather", "spread", "tensor")
# Logical axis -> mesh axes, one line each. Training: the batch is split over data and fsdp alike; parameters and what the
# optimizer keeps of them over fsdp, and inside a layer over tensor.
TRAINING: dict[str, Axes] = {
    "prompt": ("data", "fsdp", "gather"),
    "width": ("fsdp", "gather"),
    "kv_heads": ("tensor", "spread"),
    "ffn": ("tensor", "spread"),
    "vocab": ("tensor", "spread"),
    "layers": None,
    "sequence": None,  # Or as kv_heads: `use_mesh`.
}
# Decoding reads every parameter once a token: fetching the shards of others for that would cost more than all else, so each
# group of tensor-parallel devices is a replica that holds them whole.
DECODING: dict[str, Axes] = {
    "prompt": ("data", "fsdp", "spread"),
    "width": None,
    "kv_heads": ("tensor", "gather"),
    "ffn": ("tensor", "gather"),
    "vocab": ("tensor", "gather"),
    "layers": None,
    "sequence": None,
}


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None, rollout_tensor: int = 0
) -> Mesh:
    """Arrange all devices, or those given, as data × fsdp × tensor; one -1 takes what is left.

    Args:
      rollout_tensor: devices that share a policy while it samples, next to each other and, where they can be, of one host;
        0 for as many as in training.

    Raises: UserError, where it does not fit.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    unknown = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(unknown) > 1 or known < 1 or count % known or (not unknown and known != count):
        asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        needed = f"a multiple of {known}" if unknown else known
        raise UserError(f"{asked} does not fit {count} devices: it takes {needed}, with at most one -1.")
    for name in unknown:
        sizes[name] = count // known
    together = rollout_tensor or sizes["tensor"]
    gather, spread = gather_and_spread(sizes["fsdp"], sizes["tensor"], together)
    shape = sizes["data"], sizes["fsdp"] // gather, gather, spread, sizes["tensor"] // spread
    # Explicit axes, jax.make_mesh's default, would refuse the embedding look-up.
    return Mesh(_arranged(shape, devices, together), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def gather_and_spread(fsdp: int, tensor: int, together: int) -> tuple[int, int]:
    """Sizes of the mesh axes of those names, where `together` devices share a policy while it samples. Raises: UserError."""
    gather, spread = max(1, together // tensor), max(1, tensor // together)
    if tensor * gather != together * spread or fsdp % gather:
        raise UserError(
            f"mesh.rollout_tensor={together} must divide mesh.tensor={tensor}, or be a multiple of it that divides "
            f"mesh.fsdp × mesh.tensor = {fsdp * tensor}."
        )
    return gather, spread


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device], together: int) -> np.ndarray:
    """Devices so that neighbors on an axis of the mesh are neighbors in the network, where JAX finds such an order.

    But `together` next to each other are of one host, where hosts have so many.
    """
    try:
        mesh = mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        # An axis is no product of whole axes of the network, as 8 of 64 chips in a cube: it takes a part of one.
        mesh = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    by_host = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(sizes)
    return by_host if _hosts_of(mesh, together) > 1 == _hosts_of(by_host, together) else mesh


def _hosts_of(mesh: np.ndarray, together: int) -> int:
    """The most hosts that `together` devices next to each other are of."""
    return max(len({device.process_index for device in group}) for group in mesh.reshape(-1, together))


def mesh_fields(mesh: Mesh) -> dict[str, int]:
    """The fields of the config's section `mesh` that make such a mesh."""
    tensor = _ways(mesh, TRAINING["kv_heads"])
    data = mesh.shape["data"]
    sizes = {"data": data, "fsdp": num_batch_shards(mesh) // data, "tensor": tensor}
    return sizes | {"rollout_tensor": _ways(mesh, DECODING["kv_heads"])}


def num_batch_shards(mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> int:
    """How many devices, or groups of devices that share them, prompts are split over in a phase."""
    return _ways(mesh, table["prompt"])


def _ways(mesh: Mesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes or ())


def check_batches(mesh: Mesh, sizes: Mapping[str, int], table: Mapping[str, Axes] = TRAINING) -> None:
    """Refuse batches (config field -> size) that do not split evenly over the mesh in a phase. Raises: UserError."""
    ways = num_batch_shards(mesh, table)
    split = "devices / mesh.rollout_tensor" if table is DECODING else "mesh.data × mesh.fsdp"
    for name, size in sizes.items():
        if size % ways:
            raise UserError(
                f"{name}={size} cannot be split over {split} = {ways} devices; the nearest size that can is "
                f"{max(1, round(size / ways)) * ways}."
            )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, split_rows: bool = False) -> Iterator[None]:
    """Make `mesh` what the policy's logical axes refer to, as training lays them out.

    Args:
      split_rows: whether the tokens of an update's row are split, between one product of matrices and the next, over the
        devices that share it (sequence parallelism): each keeps its part of what a layer begins with.
    """
    rows = {"sequence": TRAINING["kv_heads"]} if split_rows else {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple((TRAINING | rows).items())):
        yield


def shard_map_batch(fn: Callable[..., Any], shared: Any, *arrays: Any) -> Any:
    """Call `fn(shared, *arrays)` on all devices that prompts are split over while training, with their own part of the arrays.

    What each device's part adds to the gradient of `shared` is summed over the devices once, at the end.
    """
    axes = prompt_axes(TRAINING)
    if not axes:
        return fn(shared, *arrays)
    split = PartitionSpec(axes)
    specs = PartitionSpec(), *[split] * len(arrays)
    return jax.shard_map(fn, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False)(shared, *arrays)


def prompt_axes(table: Mapping[str, Axes]) -> tuple[str, ...]:
    """Axes of the mesh in context that prompts are split over in a phase, without those of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in table["prompt"] if mesh.shape.get(axis, 1) > 1)


@contextlib.contextmanager
def in_one_replica() -> Iterator[None]:
    """Make the logical axes those of decoding inside of a replica, where no axis is left to split prompts over."""
    if jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with nn.logical_axis_rules(tuple((DECODING | {"prompt": None}).items())):
        yield


def constrain_batch(tree: Any) -> Any:
    """Split the first axis of arrays as training does, in a program: what decoding made, or XLA would lay out in its own way.

    What takes it next would be compiled once more for another layout.
    """
    if not (axes := prompt_axes(TRAINING)):
        return tree
    # One axis by its name alone, as `_shortest` has it.
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(axes if len(axes) > 1 else axes[0]))


def parameter_shardings(policy: nn.Module, mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """Return the tree of NamedShardings of the policy's parameters.

    Raises: UserError, where a size is not divisible, with the nearest mesh that divides them all.
    """
    boxed = jax.eval_shape(lambda: _init(policy, jax.random.key(0)))
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, tuple(table.items()))
    # Unboxed inside, since on a mesh that constrains what must not be abstract.
    abstract = jax.eval_shape(lambda: nn.meta.unbox(_init(policy, jax.random.key(0))))
    tensor = "tensor" if table is TRAINING else "rollout_tensor"
    _check_divisible(mesh, shardings, abstract, {table["width"]: "fsdp", table["kv_heads"]: tensor})
    return jax.tree.map(_shortest, shardings)


def make_reshard_fn(policy: nn.Module, mesh: Mesh, convert: Callable[[Any], Any]) -> Callable[[Any], Any] | None:
    """Return what moves parameters from where training keeps them to where decoding reads them, in one program.

    `convert` is applied on the way. None, where neither changes anything.
    """
    training, decoding = (parameter_shardings(policy, mesh, table) for table in (TRAINING, DECODING))
    abstract = jax.eval_shape(lambda: nn.meta.unbox(_init(policy, jax.random.key(0))))
    if training == decoding and jax.eval_shape(convert, abstract) == abstract:
        return None
    # On the way, what was split by width over "gather" is split by heads over it, each part sent once. In one go XLA would first
    # copy every parameter whole to every device.
    between = parameter_shardings(policy, mesh, DECODING | {"width": "fsdp"})
    return jax.jit(lambda x: jax.lax.with_sharding_constraint(convert(x), between), out_shardings=decoding)


def abstract_parameters(policy: nn.Module, mesh: Mesh) -> Any:
    """ModelConfig, dtype and place of every parameter, for programs that are compiled and not run."""
    shapes = jax.eval_shape(lambda: nn.meta.unbox(_init(policy, jax.random.key(0))))
    return jax.tree.map(_placed, shapes, parameter_shardings(policy, mesh))


def abstract_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> optax.OptState:
    """What `init_optimizer` makes of parameters that are abstract."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    init = functools.partial(jax.eval_shape, optimizer.init)
    return optax.tree_utils.tree_map_params(
        init,
        lambda moment, param: _placed(moment, param.sharding),
        init(params),
        params,
        transform_non_params=lambda x: _placed(x, everywhere),
    )


def abstract_prompts(tree: Any, mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """What `shard_prompts` makes of arrays that are abstract."""
    return jax.tree.map(lambda x: _placed(x, prompt_sharding(mesh, table)), tree)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def init_parameters(policy: nn.Module, mesh: Mesh, seed: int) -> Any:
    """Random float32 parameters, each made on the devices that keep it."""
    init = jax.jit(lambda key: nn.meta.unbox(_init(policy, key)), out_shardings=parameter_shardings(policy, mesh))
    return init(jax.random.key(seed))


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> optax.OptState:
    """Optimizer state: moments where their parameters are, scalars on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, param: jax.device_put(moment, param.sharding),
        optimizer.init(params),
        params,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )


def prompt_sharding(mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> NamedSharding:
    """Where arrays lie whose first axis is split as the batch of a phase is."""
    return _shortest(NamedSharding(mesh, PartitionSpec(table["prompt"])))


def shard_prompts(tree: Any, mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """Put arrays on the devices with their first axis split as the batch of a phase is."""
    sharding = prompt_sharding(mesh, table)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # Every process has the whole and gives its own devices their part; `device_put` would first compare the processes'.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def to_host(tree: Any) -> Any:
    """Return whole arrays in the memory of every process, wherever on the mesh they are; all processes must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def replicated(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if here else jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))

    return jax.device_get(jax.tree.map(replicated, tree))


def is_leader() -> bool:
    """Whether this process is the one of all that writes what they share."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has come to the same place, which `what` names."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(what)


def in_any_process(flag: bool) -> bool:
    """Whether `flag` is true in one of the processes; all must ask."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _init(policy: nn.Module, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1, 1), jnp.int32)
    return policy.init(key, tokens, tokens)["params"]


def _shortest(sharding: NamedSharding) -> NamedSharding:
    """The same placement in the words of compiled programs: no mesh axes of one device, no trailing None.

    In other words it would be another key, and whatever takes an array both fresh and from a program would compile twice.
    """
    spec = [_longer_than_one(sharding.mesh, axes) for axes in sharding.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _longer_than_one(mesh: Mesh, axes: Axes) -> Axes:
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1)
    return axes if len(axes) > 1 else axes[0] if axes else None


def _check_divisible(mesh: Mesh, shardings: Any, abstract: Any, fields: Mapping[Axes, str]) -> None:
    """`fields` are those of the config that say how many devices mesh axes have together."""
    sizes = mesh_fields(mesh)
    fitting, problem = dict(sizes), ""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        for size, axes in zip(leaf.shape, sharding.spec, strict=False):
            if axes:
                field = fields[axes]
                # A divisor of what was asked for leaves a mesh of the same number of devices.
                fitting[field] = math.gcd(fitting[field], size)
                if size % sizes[field] and not problem:
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    problem = f"mesh.{field}={sizes[field]} does not divide the {size} of parameter {name}"
    if problem:
        fitting["data"] = mesh.size // (fitting["fsdp"] * fitting["tensor"])
        if sizes["rollout_tensor"] <= sizes["tensor"]:
            fitting["rollout_tensor"] = math.gcd(fitting["rollout_tensor"], fitting["tensor"])
        shown = list(fitting) if sizes["rollout_tensor"] != sizes["tensor"] else ["data", "fsdp", "tensor"]
        nearest = ", ".join(f"mesh.{name}={fitting[name]}" for name in shown)
        raise UserError(f"{problem}; the nearest mesh that works is {nearest}.")
