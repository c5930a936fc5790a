"""The preflight command."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.preflight import run_preflight


def test_an_invalid_topology_exits_with_2_and_writes_the_error(tmp_path: Path):
    done = run_preflight("--topology=v9:2x2", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology=v9:2x2") and "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is False and result["error"].startswith("--topology=v9:2x2")


def test_a_context_that_is_too_short_is_said():
    lengths = ("--config.prompt.max_tokens=32768", "--config.training.microbatch_tokens=40000")
    done = run_preflight("--topology=h100:1", "--config.mesh.tensor=3", *lengths)
    assert done.stderr.startswith("warning: prompt.max_tokens + rollout.max_new_tokens = ")
