"""More meshes of eight simulated devices than tests/distributed/test_sharding.py has, and meshes of fewer devices."""

from __future__ import annotations

import pytest

from tests.helpers.sharded_results import (
    Results,
    assert_equal_rollouts,
    assert_equal_steps,
    assert_shardings_kept,
    assert_stored_once_per_replica,
    run_on_meshes,
)

pytestmark = pytest.mark.slow

MESHES = ["8x1x1x1", "2x2x2x2", "1x4x2x2"]
FEWER = ["2x1x1x1", "1x1x2x2", "2x1x2x2"]  # Two and four devices.


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_meshes(tmp_path_factory.mktemp("sharded") / "out.npz", *MESHES, *FEWER)


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(results: Results, mesh: str) -> None:
    assert_equal_steps(results, mesh)


@pytest.mark.parametrize("mesh", FEWER)
def test_rollouts_on_fewer_devices_equal_those_on_one(results: Results, mesh: str) -> None:
    assert_equal_rollouts(results, mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_and_moments_are_stored_once_per_replica(results: Results, mesh: str) -> None:
    assert_stored_once_per_replica(results, mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_keeps_the_shardings_of_the_state(results: Results, mesh: str) -> None:
    assert_shardings_kept(results, mesh)
