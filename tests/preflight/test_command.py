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
