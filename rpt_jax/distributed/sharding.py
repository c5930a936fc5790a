"""Shardings of parameters, optimizer state and batches on a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rpt_jax.distributed.mesh import DECODING, TRAINING, Axes, mesh_fields, prompt_axes, rollout_tensor_sizes
from rpt_jax.errors import UserError

# --- parameters ------------------------------------------------------------------------------------


def parameter_shardings(policy: nn.Module, mesh: Mesh | AbstractMesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """Return the tree of NamedShardings of the policy's parameters in a phase.

    Raises:
      UserError: the mesh does not divide a parameter evenly; the message gives the nearest mesh that divides all of them.
    """
    shardings = logical_to_mesh_sharding(_logical_axes(policy), cast(Mesh, mesh), tuple(table.items()))
    tensor_field = "tensor" if table is TRAINING else "rollout_tensor"
    _check_divisible(
        mesh, shardings, _abstract_values(policy), {table["width"]: "fsdp", table["kv_heads"]: tensor_field}
    )
    return jax.tree.map(_canonical, shardings)


class _Change(NamedTuple):
    """What resharding does to a parameter: its dtype and sharding afterwards, and a sharding on the way."""

    dtype: Any
    between: NamedSharding
    after: NamedSharding


class Reshard:
    """Moves parameters from the training layout to the rollout layout, and rounds them; what does not change is not copied.

    Args:
      changes: of each parameter, in the order of `jax.tree.leaves`; None for no change.
    """

    def __init__(self, changes: Sequence[_Change | None]):
        self._changes = changes
        done = [change for change in changes if change]

        def move(params: list[jax.Array]) -> list[jax.Array]:
            return [
                jax.lax.with_sharding_constraint(x.astype(change.dtype), change.between)
                for x, change in zip(params, done, strict=True)
            ]

        self._move = jax.jit(move, out_shardings=[change.after for change in done])

    def __call__(self, params: Any) -> Any:
        moved = iter(self._move(self._changing(params)))
        leaves, structure = jax.tree.flatten(params)
        return structure.unflatten(
            [next(moved) if change else x for x, change in zip(leaves, self._changes, strict=True)]
        )

    def lower(self, params: Any) -> jax.stages.Lowered:
        """Return the program for abstract parameters."""
        return self._move.lower(self._changing(params))

    def _changing(self, params: Any) -> list[Any]:
        return [x for x, change in zip(jax.tree.leaves(params), self._changes, strict=True) if change]


def make_reshard_fn(policy: nn.Module, mesh: Mesh, convert: Callable[[Any], Any]) -> Reshard | None:
    """Return what moves parameters from the training layout to the rollout layout; None if nothing changes.

    Args:
      policy: the module whose parameters are moved.
      mesh: the mesh of the run.
      convert: returns parameters with the dtypes that rollouts use.
    """
    # Reshard in two steps: first turn the split of the width over "fsdp_to_tp" into a split of the heads (an all-to-all), then
    # gather the rest of the width. In a single step XLA would first replicate every parameter on every device.
    layouts = (parameter_shardings(policy, mesh, table) for table in (TRAINING, DECODING | {"width": "fsdp"}, DECODING))
    abstract = _abstract_values(policy)

    def change(old: Any, new: Any, before: NamedSharding, between: NamedSharding, after: NamedSharding) -> Any:
        return None if old == new and before == after else _Change(dtype=new.dtype, between=between, after=after)

    trees = (abstract, jax.eval_shape(convert, abstract), *layouts)
    changes = [change(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    return Reshard(changes) if any(changes) else None


def init_parameters(
    policy: nn.Module, mesh: Mesh, seed: int, select: Callable[[Any], Any] = lambda params: params
) -> Any:
    """Return random parameters, each shard initialized on the device that holds it.

    Args:
      policy: the module whose parameters are initialized.
      mesh: the mesh of the run.
      seed: of the random numbers.
      select: returns the part of a tree of parameters that is needed.
    """
    init = jax.jit(
        lambda key: select(nn.meta.unbox(_init(policy, key))), out_shardings=select(parameter_shardings(policy, mesh))
    )
    return init(jax.random.key(seed))


def abstract_parameters(policy: nn.Module, mesh: Mesh) -> Any:
    """Return shape, dtype and sharding of every parameter, to compile programs without allocating anything."""
    return jax.tree.map(_with_sharding, _abstract_values(policy), parameter_shardings(policy, mesh))


def _init(policy: nn.Module, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1, 1), jnp.int32)
    return policy.init(key, tokens, tokens)["params"]


@functools.lru_cache(maxsize=8)
def _logical_axes(policy: nn.Module) -> Any:
    """Return the names of the axes of every parameter."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init(policy, jax.random.key(0))))


@functools.lru_cache(maxsize=8)
def _abstract_values(policy: nn.Module) -> Any:
    """Return shape and dtype of every parameter."""
    # Unboxed inside: on a mesh, unboxing applies a sharding constraint, which abstract values do not support.
    return jax.eval_shape(lambda: nn.meta.unbox(_init(policy, jax.random.key(0))))


# --- optimizer state -------------------------------------------------------------------------------


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> optax.OptState:
    """Return the initial optimizer state: moments sharded as their parameters, scalars replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, param: jax.device_put(moment, param.sharding),
        optimizer.init(params),
        params,
        transform_non_params=lambda x: jax.device_put(x, replicated),
    )


def abstract_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> optax.OptState:
    """Return shapes, dtypes and shardings of what `init_optimizer` returns for abstract parameters."""
    replicated = NamedSharding(mesh, PartitionSpec())
    init = functools.partial(jax.eval_shape, optimizer.init)
    return optax.tree_utils.tree_map_params(
        init,
        lambda moment, param: _with_sharding(moment, param.sharding),
        init(params),
        params,
        transform_non_params=lambda x: _with_sharding(x, replicated),
    )


# --- batches ---------------------------------------------------------------------------------------


def prompt_sharding(mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch axis of a phase."""
    return _canonical(NamedSharding(mesh, PartitionSpec(table["prompt"])))


def shard_prompts(tree: Any, mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """Move host arrays to the devices, their first axis split as the batch of a phase is."""
    sharding = prompt_sharding(mesh, table)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # Every process has the complete array and copies only the shards of its own devices. (`device_put` would first compare the
    # arrays of all processes.)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def abstract_prompts(tree: Any, mesh: Mesh, table: Mapping[str, Axes] = TRAINING) -> Any:
    """Return shapes, dtypes and shardings of what `shard_prompts` returns for abstract arrays."""
    return jax.tree.map(lambda x: _with_sharding(x, prompt_sharding(mesh, table)), tree)


def constrain_batch(tree: Any) -> Any:
    """Constrain the first axis of arrays inside a program to the batch sharding of training.

    Outputs of rollouts, and arrays whose layout XLA chose, would otherwise make the next program compile once more.
    """
    axes = prompt_axes(TRAINING)
    if not axes:
        return tree
    # A single axis goes in as its name, the form that `_canonical` uses.
    spec = PartitionSpec(*axes) if len(axes) == 1 else PartitionSpec(axes)
    return jax.lax.with_sharding_constraint(tree, spec)


def shard_map_batch(fn: Callable[..., Any], shared: Any, *arrays: Any) -> Any:
    """Call `fn(shared, *arrays)` on every batch shard of training, each with its own part of `arrays`.

    The gradient of `shared` is summed over the shards once, after the call.

    Args:
      fn: returns arrays whose first axis is the batch axis.
      shared: replicated over the batch shards, for example parameters.
      *arrays: arrays whose first axis is the batch axis.
    """
    axes = prompt_axes(TRAINING)
    if not axes:
        return fn(shared, *arrays)
    split = PartitionSpec(axes)
    specs = (PartitionSpec(), *[split] * len(arrays))
    return jax.shard_map(fn, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False)(shared, *arrays)


# --- helpers ---------------------------------------------------------------------------------------


def _with_sharding(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _canonical(sharding: NamedSharding) -> NamedSharding:
    """Return the same placement in the form that compiled programs return: no axes of size 1, no trailing None.

    Equivalent shardings in different forms are different cache keys: a program that takes both new arrays and outputs of
    another program would be compiled twice.
    """
    spec = [_without_trivial_axes(sharding.mesh, axes) for axes in sharding.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _without_trivial_axes(mesh: Mesh | AbstractMesh, axes: Axes) -> Axes:
    names = (axes,) if isinstance(axes, str) else axes or ()
    kept = tuple(axis for axis in names if mesh.shape[axis] > 1)
    if len(kept) > 1:
        return kept
    return kept[0] if kept else None


def _check_divisible(
    mesh: Mesh | AbstractMesh, shardings: Any, abstract: Any, field_of_axes: Mapping[Axes, str]
) -> None:
    """Check that every parameter axis is a multiple of the number of devices that it is split over.

    Args:
      mesh: the mesh of the run.
      shardings: tree of the parameters' NamedShardings.
      abstract: tree of the parameters' shapes.
      field_of_axes: the field of config section `mesh` that sets the total size of these mesh axes.
    """
    # Reduce each size to one that divides every parameter, and keep the first parameter that the requested one does not divide.
    sizes = mesh_fields(mesh)
    fitting = dict(sizes)
    problem = ""
    problem_field = ""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        for size, axes in zip(leaf.shape, sharding.spec, strict=False):
            if not axes:
                continue
            field = field_of_axes[axes]
            # A divisor of the requested size keeps the number of devices; `data` takes up the rest.
            fitting[field] = math.gcd(fitting[field], size)
            if size % sizes[field] and not problem:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                problem_field = f"mesh.{field}"
                problem = f"{problem_field}={sizes[field]} does not divide the {size} of parameter {name}"
    if not problem:
        return

    # Complete the nearest mesh: all devices are used, and rollouts still fit the training layout.
    fitting["data"] = mesh.size // (fitting["fsdp"] * fitting["tensor"])
    possible = rollout_tensor_sizes(fitting["fsdp"], fitting["tensor"])
    fitting["rollout_tensor"] = max(size for size in possible if fitting["rollout_tensor"] % size == 0)
    shown = list(fitting) if sizes["rollout_tensor"] != sizes["tensor"] else ["data", "fsdp", "tensor"]
    nearest = ", ".join(f"mesh.{name}={fitting[name]}" for name in shown)
    raise UserError(f"{problem}; the nearest mesh that works is {nearest}.", field=problem_field)
