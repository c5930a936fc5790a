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
# Logical axis -> mesh axes, one line each. Training: the batch is split over data and fsdp alike; parameters and what the
# optimiser keeps of them over fsdp, and inside a layer over tensor.
TRAINING = {
    "prompt": ("data", "fsdp"),
    "width": "fsdp",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "layers": None,
}
# Decoding reads every parameter once a token: fetching the shards of others for that would cost more than all else, so each
# group of tensor-parallel devices is a replica that holds them whole.
DECODING = TRAINING | {"width": None}
PROMPT_AXIS = PartitionSpec(("data", "fsdp"))


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange all devices, or those given, as data × fsdp × tensor; one -1 takes what is left.

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
    # Explicit axes, jax.make_mesh's default, would refuse the embedding look-up.
    return Mesh(_arranged(tuple(sizes.values()), devices), tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices so that neighbours on an axis of the mesh are neighbours in the network, where JAX finds such an order."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        # An axis is no product of whole axes of the network, as 8 of 64 chips in a cube: it takes a part of one.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def prompt_ways(mesh: Mesh) -> int:
    """How many devices, or groups of devices that share them, prompts are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batches(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuse batches (config field -> size) that do not split evenly over the mesh. Raises: UserError."""
    ways = prompt_ways(mesh)
    for name, size in sizes.items():
        if size % ways:
            raise UserError(
                f"{name}={size} cannot be split over mesh.data × mesh.fsdp = {ways} devices; the nearest size that can is "
                f"{max(1, round(size / ways)) * ways}."
            )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Make `mesh` what the policy's logical axes refer to; its activations lie alike in training and decoding."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(TRAINING.items())):
        yield


def parameter_shardings(policy: nn.Module, mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """Return the tree of NamedShardings of the policy's parameters.

    Raises: UserError, where a size is not divisible, with the nearest mesh that divides them all.
    """
    boxed = jax.eval_shape(lambda: _init(policy, jax.random.key(0)))
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, tuple(table.items()))
    # Unboxed inside, since on a mesh that constrains what must not be abstract.
    abstract = jax.eval_shape(lambda: nn.meta.unbox(_init(policy, jax.random.key(0))))
    _check_divisible(mesh, shardings, abstract)
    return jax.tree.map(_shortest, shardings)


def decoding_layout(policy: nn.Module, mesh: Mesh, convert: Callable[[Any], Any]) -> Callable[[Any], Any] | None:
    """Return what moves parameters from where training keeps them to where decoding reads them, in one program.

    `convert` is applied on the way. None, where neither changes anything.
    """
    training, decoding = (parameter_shardings(policy, mesh, table) for table in (TRAINING, DECODING))
    abstract = jax.eval_shape(lambda: nn.meta.unbox(_init(policy, jax.random.key(0))))
    if training == decoding and jax.eval_shape(convert, abstract) == abstract:
        return None
    return jax.jit(convert, out_shardings=decoding)


def abstract_parameters(policy: nn.Module, mesh: Mesh) -> Any:
    """Shape, dtype and place of every parameter, for programs that are compiled and not run."""
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


def abstract_prompts(tree: Any, mesh: Mesh) -> Any:
    """What `shard_prompts` makes of arrays that are abstract."""
    return jax.tree.map(lambda x: _placed(x, _shortest(NamedSharding(mesh, PROMPT_AXIS))), tree)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def init_parameters(policy: nn.Module, mesh: Mesh, seed: int) -> Any:
    """Random float32 parameters, each made on the devices that keep it."""
    init = jax.jit(lambda key: nn.meta.unbox(_init(policy, key)), out_shardings=parameter_shardings(policy, mesh))
    return init(jax.random.key(seed))


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> optax.OptState:
    """Optimiser state: moments where their parameters are, scalars on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, param: jax.device_put(moment, param.sharding),
        optimizer.init(params),
        params,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )


def shard_prompts(tree: Any, mesh: Mesh) -> Any:
    """Put arrays on the devices with their first axis split as the batch is."""
    sharding = _shortest(NamedSharding(mesh, PROMPT_AXIS))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # Every process has the whole and gives its own devices their part; `device_put` would first compare the processes'.
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
        multihost_utils.sync_global_devices(what)


def in_any_process(flag: bool) -> bool:
    """Whether `flag` is true in one of the processes; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _init(policy: nn.Module, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1, 1), jnp.int32)
    return policy.init(key, tokens, tokens)["params"]


def _shortest(sharding: NamedSharding) -> NamedSharding:
    """The same placement in the words of compiled programs: no mesh axes of one device, no trailing None.

    In other words it would be another key, and whatever takes an array both fresh and from a program would compile twice.
    """
    spec = []
    for axes in sharding.spec:
        axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if sharding.mesh.shape[a] > 1)
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _check_divisible(mesh: Mesh, shardings: Any, abstract: Any) -> None:
    fitting, problem = dict(mesh.shape), ""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        for size, axes in zip(leaf.shape, sharding.spec, strict=False):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                # A divisor of what was asked for leaves a mesh of the same number of devices.
                fitting[axis] = math.gcd(fitting[axis], size)
                if size % mesh.shape[axis] and not problem:
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    problem = f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} of parameter {name}"
    if problem:
        fitting["data"] = mesh.size // (fitting["fsdp"] * fitting["tensor"])
        nearest = ", ".join(f"mesh.{axis}={size}" for axis, size in fitting.items())
        raise UserError(f"{problem}; the nearest mesh that works is {nearest}.")
