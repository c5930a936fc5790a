"""The bench of a device, whole, with tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

pytestmark = pytest.mark.slow

PARTS = ["ceilings", "parity", "attention", "rollout", "update", "step", "transformers", "profile"]


def test_every_part_measures_something(tmp_path: Path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "rpt_jax.bench", "device", f"--json={out}", "--minutes=60"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(out.read_text())
    assert content["sizes"] == "tiny" and content["machine"]["platform"] == "cpu"
    assert list(content["parts"]) == PARTS
    for name, part in content["parts"].items():
        assert part["status"] == "complete", (name, part["notes"])
        assert part["figures"], name
        # What a CPU lacks is said; no measurement failed.
        assert all("GPU" in note for note in part["notes"]), part["notes"]
    assert all(figure["agrees"] for figure in content["parts"]["parity"]["figures"])
    assert {ratio["work"].partition(",")[0] for ratio in content["ratios"]} == {"rollout", "update"}
