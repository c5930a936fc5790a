"""Whole compilations by preflight, for this machine and for TPUs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.helpers.flops import token_flops
from tests.helpers.preflight import check_small_step, make_small_step, run_preflight

pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_a_step_reads_its_weights_for_every_token():
    small = make_small_step()
    reports = check_small_step(small, "sample", "update")
    # Two prompts of 16 tokens with two responses of 8 each. The head sees response positions only.
    config = small.step.policy.config
    prompt = sum(token_flops(config, keys, head=False) for keys in range(1, 16))
    responses = 2 * sum(token_flops(config, keys, head=True) for keys in range(16, 24))
    assert reports["update"].flops == pytest.approx(3 * 2 * (prompt + responses))
    assert reports["update"].flops > 3 * reports["sample"].flops
    sample = reports["sample"].traffic
    assert sample is not None and not sample.unknown_loops
    # Seven decode steps follow the first token.
    assert sample.memory > 7 * 4 * small.step.policy.config.matmul_parameters


def test_gpus_are_estimated_on_simulated_cpu_devices(tmp_path: Path):
    done = run_preflight("--topology=h100:2", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is True and result["compiled_for"] == "simulated CPU devices"
    assert "simulated CPU devices" in done.stdout and "It fits." in done.stdout
    assert {p["program"] for p in result["programs"]} == {"score", "sample", "reward", "update"}


@needs_libtpu
def test_a_tpu_slice_is_compiled_for(tmp_path: Path):
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    done = run_preflight("--topology=v5e:2x2", *mesh, f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is True and result["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2, "rollout_tensor": 2}
    by_name = {p["program"]: p for p in result["programs"]}
    assert set(by_name) == {"score", "reshard", "sample", "reward", "update"}
    assert by_name["reshard"]["collectives"] and by_name["update"]["collectives"]
    assert by_name["update"]["memory_bytes"]["limit"] == int(15.75 * 2**30)
    # Every data-dependent loop is matched by its scope.
    assert not any(p["loops_counted_once"] for p in result["programs"])


@needs_libtpu
def test_a_sweep_recommends_a_mesh_that_fits(tmp_path: Path):
    done = run_preflight("--topology=v5e:1x1", "--sweep", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is True
    assert result["recommended"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "rollout_tensor": 1}
    assert "Recommended: --config.mesh.data=1" in done.stdout
