"""Every example runs with the command that its page in the docs gives."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.examples import PAGES
from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("example", PAGES)
def test_an_example_trains_with_the_command_of_its_page(example: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guides" / PAGES[example]).read_text()
    assert f'--8<-- "examples/{example}.py"' in page
    [command] = re.findall(rf"^    (python -m rpt_jax\.main --config=examples/{example}\.py)$", page, re.MULTILINE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    arguments = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / f"{example}_seed0" / "result.json").read_text())
    assert result["after"]["reasoning"]["easy"]["positions"] > 0
