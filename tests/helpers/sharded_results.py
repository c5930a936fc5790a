"""What a process with eight simulated devices computes on several meshes, and what must hold on each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers import sharded_child
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, with_devices

# A mesh, as in `sharded_child`, and its arrays by their names.
Results = dict[str, dict[str, np.ndarray]]
ALONE = "1x1x1x1"


def run_on_meshes(out: Path, *meshes: str, option: str = "") -> Results:
    """Return the results on one device, on the given meshes and of another seed, computed by a process with eight devices.

    Args:
      out: file that the process writes.
      *meshes: as in `sharded_child`.
      option: an option of `sharded_child`.
    """
    child = [sys.executable, "-m", "tests.helpers.sharded_child", str(out), ALONE, *meshes, *filter(None, [option])]
    done = subprocess.run(
        child, cwd=ROOT, env=with_devices(sharded_child.DEVICES), capture_output=True, text=True, timeout=CHILD_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # XLA's warning when it can only change a sharding by replicating the array on every device. (Programs from the cache do not
    # warn, but those have not changed.)
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr[-3000:]
    by_mesh: Results = {}
    with np.load(out) as arrays:
        for name in arrays:
            mesh, _, leaf = name.partition("/")
            by_mesh.setdefault(mesh, {})[leaf] = arrays[name]
    return by_mesh


def assert_leaves_equal(results: Results, mesh: str, prefix: str, tolerance: float) -> None:
    names = [name for name in results[mesh] if name.startswith(prefix)]
    assert names
    for name in names:
        np.testing.assert_allclose(results[mesh][name], results[ALONE][name], rtol=0, atol=tolerance, err_msg=name)


def assert_equal_rollouts(results: Results, mesh: str) -> None:
    """Tokens are equal bit for bit; log-probabilities up to rounding."""
    for leaf, tolerance in (("tokens", 0), ("lengths", 0), ("ended", 0), ("logprobs", 1e-5)):
        assert_leaves_equal(results, mesh, f"first.rollouts.{leaf}", tolerance)


def assert_equal_steps(results: Results, mesh: str) -> None:
    """Initial weights, tokens and rewards are equal bit for bit; log-probabilities, loss and gradients up to rounding."""
    reward, lengths = results[ALONE]["first.reward"], results[ALONE]["first.rollouts.lengths_PxG"]
    varied = reward.max(axis=1) > reward.min(axis=1)
    assert 2 <= varied.sum() < len(varied) and len(np.unique(lengths)) > 2, "the example tests too little"
    assert results[mesh].keys() == results[ALONE].keys()
    assert_equal_rollouts(results, mesh)
    for exact in ("start", "first.reward", "first.status"):
        assert_leaves_equal(results, mesh, exact, 0)
    assert_leaves_equal(results, mesh, "first.metrics", 1e-5)
    assert_leaves_equal(results, mesh, "moments", 1e-7)
    assert results[ALONE]["first.metrics.gradient/norm"] > 0.1, "the gradients test too little"
    # The second step samples from the weights that the first one changed.
    assert_leaves_equal(results, mesh, "second", 0)
    assert_leaves_equal(results, mesh, "params", 1e-5)


def assert_stored_once_per_replica(results: Results, mesh: str) -> None:
    """Matrices and Adam's moments are stored once per data-parallel replica; only vectors are replicated on every device."""
    data, fsdp, *_ = map(int, mesh.split("x"))
    for name, stored in results[mesh].items():
        if name.startswith("stored."):
            whole, copies = results[ALONE][name], sharded_child.DEVICES if "norm" in name else data
            assert stored == whole * copies, name
    assert results[mesh]["prompts_on_one_device"] == sharded_child.P // (data * fsdp)


def assert_shardings_kept(results: Results, mesh: str) -> None:
    """Otherwise the next step would be compiled again and could not reuse donated buffers."""
    moved = [name for name, leaf in results[mesh].items() if name.startswith("moved.") and leaf]
    assert not moved
    assert results[mesh]["compiled_again"] == 0
