"""Meshes and shardings, and that no mesh changes what is computed."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from rpt_jax.distributed.mesh import DECODING, MESH_AXES, check_batches, make_mesh, mesh_fields
from rpt_jax.distributed.sharding import parameter_shardings
from rpt_jax.errors import UserError
from tests.helpers.policy_reference import POLICY
from tests.helpers.sharded_results import (
    ALONE,
    assert_equal_steps,
    assert_shardings_kept,
    assert_stored_once_per_replica,
    run_on_meshes,
)

FIELDS = ("data", "fsdp", "tensor", "rollout_tensor")


def abstract_mesh(data: int, fsdp: int, tensor: int, rollout_tensor: int = 0) -> AbstractMesh:
    """Return the mesh that `make_mesh` returns, without devices."""
    rollout_tensor = rollout_tensor or tensor
    fsdp_to_tp = max(1, rollout_tensor // tensor)
    tp_to_dp = max(1, tensor // rollout_tensor)
    return AbstractMesh((data, fsdp // fsdp_to_tp, fsdp_to_tp, tp_to_dp, tensor // tp_to_dp), MESH_AXES)


# One where the rollouts use less tensor parallelism than the update, whose rows are split, and one where they use more.
# tests/slow/test_sharding.py has others.
MESHES = ["1x4x2x1", "2x4x1x2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_on_meshes(tmp_path_factory.mktemp("sharded") / "out.npz", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(results, mesh):
    assert_equal_steps(results, mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_and_moments_are_stored_once_per_replica(results, mesh):
    assert_stored_once_per_replica(results, mesh)


@pytest.mark.parametrize("mesh", [ALONE, *MESHES])
def test_a_step_keeps_the_shardings_of_the_state(results, mesh):
    assert_shardings_kept(results, mesh)


@pytest.mark.parametrize(
    ("sizes", "devices", "nearest", "field"),
    [
        ((2, 1, 1), 1, (1, 1, 1), "mesh.data"),
        ((1, 1, 3), 8, (4, 1, 2), "mesh.tensor"),
        ((-1, 3, 1), 8, (4, 2, 1), "mesh.fsdp"),
        ((0, 1, 1), 8, (8, 1, 1), "mesh.data"),
        ((-1, -1, 1), 8, (8, 1, 1), "mesh.fsdp"),
        ((8, 8, 8), 8, (1, 1, 8), "mesh.fsdp"),
        ((-1, 0, 1), 8, (8, 1, 1), "mesh.fsdp"),
        ((1, 16, 1), 8, (1, 8, 1), "mesh.fsdp"),
        ((1, 4, 1), 8, (2, 4, 1), "mesh.data"),
        ((1, -1, 8), 1, (1, 1, 1), "mesh.tensor"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_one_that_does(sizes, devices, nearest, field):
    numbers = list(range(devices))  # Only the number of devices matters here.
    with pytest.raises(UserError) as error:
        make_mesh(*sizes, devices=numbers)
    assert error.value.field == field
    for axis, size, fitting in zip(FIELDS, sizes, nearest, strict=False):
        assert f"mesh.{axis}={size}" in str(error.value)
        assert f"mesh.{axis}={fitting}" in str(error.value).partition("nearest")[2]
    assert math.prod(nearest) == devices and f" {devices} device" in str(error.value)


def test_minus_one_takes_all_remaining_devices():
    for sizes in ((-1, 1, 1), (1, -1, 1), (1, 1, -1), (1, 1, 1)):
        mesh = make_mesh(*sizes)
        assert mesh_fields(mesh) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1, "rollout_tensor": 1}
        assert mesh.axis_names == MESH_AXES


def test_a_batch_that_does_not_split_evenly_is_refused():
    mesh = abstract_mesh(2, 4, 2)
    check_batches(mesh, {"training.prompts_per_step": 8, "data.score_batch_windows": 32})
    with pytest.raises(UserError) as raised:
        check_batches(abstract_mesh(2, 4, 2, 1), {"n": 8}, DECODING)
    assert raised.value.field == "n" and "mesh.rollout_tensor = 16" in str(raised.value)
    check_batches(abstract_mesh(2, 4, 2, 1), {"n": 8})
    for size, nearest in ((1, 8), (11, 8), (13, 16), (31, 32)):
        with pytest.raises(UserError) as raised:
            check_batches(mesh, {"fits": 16, "some.field": size})
        assert raised.value.field == "some.field"
        assert f"some.field={size} " in str(raised.value) and str(raised.value).endswith(f" {nearest}.")


def test_a_parameter_that_does_not_divide_evenly_is_refused():
    """Two kv heads over four devices; a width of 16 over three; both. The suggested mesh has as many devices, and works."""
    cases = {
        (2, 1, 4): ("mesh.tensor", "layers.k", (4, 1, 2)),
        (1, 3, 1): ("mesh.fsdp", "embedding", (3, 1, 1)),
        (1, 6, 4): ("mesh.fsdp", "embedding", (6, 2, 2)),
    }
    for requested, (field, parameter, nearest) in cases.items():
        suggested = ", ".join(f"mesh.{name}={size}" for name, size in zip(FIELDS, nearest, strict=False))
        with pytest.raises(UserError) as raised:
            parameter_shardings(POLICY, abstract_mesh(*requested))
        assert raised.value.field == field
        assert parameter in str(raised.value) and suggested in str(raised.value)
        parameter_shardings(POLICY, abstract_mesh(*nearest))
    with pytest.raises(UserError) as raised:
        parameter_shardings(POLICY, abstract_mesh(1, 8, 1, 4), DECODING)
    assert raised.value.field == "mesh.rollout_tensor" and "mesh.tensor=1, mesh.rollout_tensor=2" in str(raised.value)
    with pytest.raises(UserError) as raised:
        parameter_shardings(POLICY, abstract_mesh(1, 6, 1, 3))
    assert raised.value.field == "mesh.fsdp"
    assert "mesh.data=3, mesh.fsdp=2, mesh.tensor=1, mesh.rollout_tensor=1." in str(raised.value)


def test_parameters_are_split_over_fsdp_and_tensor():
    shardings = parameter_shardings(POLICY, abstract_mesh(1, 4, 2))
    assert shardings["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["layers"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert shardings["layers"]["q"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_decoding_splits_parameters_over_tensor_only():
    shardings = parameter_shardings(POLICY, abstract_mesh(1, 4, 2), DECODING)
    assert shardings["embedding"].spec == PartitionSpec("tensor")
    assert shardings["layers"]["down"].spec == PartitionSpec(None, "tensor")
    assert shardings["layers"]["q"].spec == PartitionSpec(None, None, "tensor")


def test_decoding_can_use_another_tensor_parallel_size():
    wider, narrower = (
        parameter_shardings(POLICY, abstract_mesh(*sizes), DECODING) for sizes in ((1, 8, 1, 2), (1, 4, 2, 1))
    )
    assert wider["layers"]["q"].spec == PartitionSpec(None, None, "fsdp_to_tp")
    assert parameter_shardings(POLICY, abstract_mesh(1, 8, 1, 2))["layers"]["q"].spec == PartitionSpec(
        None, ("fsdp", "fsdp_to_tp")
    )
    assert narrower["layers"]["q"].spec == PartitionSpec()


@pytest.mark.parametrize(
    ("sizes", "rollout_tensor", "nearest"),
    [((1, 4, 2), 3, 2), ((4, 1, 2), 4, 2), ((1, 2, 4), 3, 2), ((1, 8, 1), 16, 8), ((1, 4, 2), 7, 8)],
)
def test_a_rollout_group_that_does_not_fit_the_mesh_is_refused(sizes, rollout_tensor, nearest):
    with pytest.raises(UserError) as raised:
        make_mesh(*sizes, devices=list(range(8)), rollout_tensor=rollout_tensor)
    assert raised.value.field == "mesh.rollout_tensor"
    assert f"mesh.rollout_tensor={rollout_tensor} " in str(raised.value)
    assert str(raised.value).endswith(f" {nearest}.")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice whose hosts have 2 x 2 chips each."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    slice_index: int = 0


def test_a_rollout_group_stays_on_one_host():
    """Ordered by the network alone, a group would be a row of four chips, which belongs to two hosts."""
    places = [(x, y) for x in range(8) for y in range(8)]
    chips = [Chip(8 * x + y, x // 2 * 4 + y // 2, (x, y, 0)) for x, y in places]
    mesh = make_mesh(1, 8, 8, chips, rollout_tensor=4)
    assert len(set(mesh.devices.flat)) == 64
    for group in mesh.devices.reshape(-1, 4):
        assert len({chip.process_index for chip in group}) == 1


def two_hosts_each(slices: int) -> list[Chip]:
    """Return the chips of TPU slices of 2 x 4 chips, the later slices first."""
    places = [(index, x, y) for index in reversed(range(slices)) for x in range(2) for y in range(4)]
    return [Chip(8 * i + 4 * x + y, 2 * i + y // 2, (x, y, 0), slice_index=i) for i, x, y in places]


@pytest.mark.parametrize(
    ("slices", "sizes", "rollout_tensor"),
    [
        (2, (2, 8, 1), 0),
        (2, (4, 2, 2), 4),
        (2, (1, 16, 1), 4),
        (4, (2, 8, 2), 4),
        (3, (-1, 4, 2), 1),
        (6, (2, 24, 1), 4),
    ],
)
def test_tensor_parallel_groups_stay_in_one_tpu_slice(slices, sizes, rollout_tensor):
    mesh = make_mesh(*sizes, two_hosts_each(slices), rollout_tensor=rollout_tensor)
    assert len(set(mesh.devices.flat)) == 8 * slices
    data, fsdp, *_ = mesh.devices.shape
    for group in mesh.devices.reshape(data * fsdp, -1):
        assert len({chip.slice_index for chip in group}) == 1
    if data % slices == 0:  # Then FSDP groups do, too.
        for group in mesh.devices.reshape(data, -1):
            assert len({chip.slice_index for chip in group}) == 1


def test_a_mesh_that_cannot_be_split_over_tpu_slices_is_refused():
    with pytest.raises(UserError, match="mesh.data=1 does not fit 2 TPU slices") as raised:
        make_mesh(1, 1, 16, two_hosts_each(2))
    assert raised.value.field == "mesh.data"


def test_another_seed_gives_different_parameters(results):
    for name, leaf in results["another seed"].items():
        assert leaf.dtype == np.float32
        assert np.array_equal(leaf, results[ALONE][name]) == ("norm" in name), name
