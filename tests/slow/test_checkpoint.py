"""Checkpoints across meshes and stop signals, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rpt_jax.errors import ExitCode
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, with_devices

pytestmark = pytest.mark.slow


def test_a_checkpoint_is_restored_on_another_mesh(tmp_path):
    """Eight devices, then two, then one: the checksums of a checkpoint do not depend on the sharding."""
    for action, devices, fsdp, tensor in (("save", 8, 4, 2), ("restore", 2, 1, 2), ("restore", 1, 1, 1)):
        run = [sys.executable, "-m", "tests.helpers.checkpoint_child", action, str(tmp_path), str(fsdp), str(tensor)]
        done = subprocess.run(
            run, cwd=ROOT, env=with_devices(devices), capture_output=True, text=True, timeout=CHILD_SECONDS
        )
        assert done.stdout == f"{action} {devices}\n", done.stderr


def test_a_stop_signal_saves_what_the_registered_checkpointer_has_staged(tmp_path):
    """Another checkpointer is open, but only the one that was registered saves."""
    command = [sys.executable, "-m", "tests.helpers.checkpoint_child"]
    options = {"cwd": ROOT, "env": with_devices(1), "capture_output": True, "text": True, "timeout": 600}
    stopped = subprocess.run([*command, "stop", str(tmp_path), "1", "1"], **options)
    assert stopped.returncode == ExitCode.RESTART and "Stopped: everything up to step 3 is in" in stopped.stderr, (
        stopped
    )
    assert not list((tmp_path / "other").rglob("9"))
    restored = subprocess.run([*command, "restore", str(tmp_path), "1", "1"], **options)
    assert restored.returncode == 0, restored.stderr
