"""The preflight command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpt_jax.preflight.report import for_topology
from rpt_jax.preflight.topology import parse_topology
from tests.helpers.preflight import run_preflight, small_experiment


def test_an_invalid_topology_exits_with_2_and_writes_the_error(tmp_path: Path):
    done = run_preflight("--topology=v9:2x2", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology=v9:2x2") and "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is False and result["error"].startswith("--topology=v9:2x2")


@pytest.mark.parametrize(("topology", "attention"), [("v6e:2x2", "auto"), ("h100:8", "blockwise")], ids=["tpu", "gpu"])
def test_a_run_is_compiled_with_the_precision_that_the_chips_choose(topology: str, attention: str):
    experiment = small_experiment("policy.dtype=auto", "policy.head_precision=auto", "policy.attention=auto")
    policy = for_topology(experiment, parse_topology(topology)).policy
    assert (policy.dtype, policy.head_precision, policy.attention) == ("bfloat16", "bfloat16", attention)
    named = small_experiment("policy.dtype=float32", "policy.head_precision=tensorfloat32")
    policy = for_topology(named, parse_topology(topology)).policy
    assert (policy.dtype, policy.head_precision) == ("float32", "tensorfloat32")


def test_a_context_that_is_too_short_is_said():
    lengths = ("--config.prompt.max_tokens=32768", "--config.training.microbatch_tokens=40000")
    done = run_preflight("--topology=h100:1", "--config.mesh.tensor=3", *lengths)
    assert done.stderr.startswith("warning: prompt.max_tokens + rollout.max_new_tokens = ")
