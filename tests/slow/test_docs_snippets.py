"""The Python code of the pages runs as it stands, in a separate process, because it registers choices."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

pytestmark = pytest.mark.slow


def test_every_python_snippet_runs_as_it_stands() -> None:
    # A page imports this file of the reader's.
    run = ["import sys, types", "sys.modules['my_rewards'] = types.ModuleType('my_rewards')"]
    for page in [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"]:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            # Code without imports is part of a function; files that the site includes from examples/ have their own tests.
            if re.search(r"^(from|import) ", code, re.MULTILINE):
                run.append(f"exec(compile({code!r}, {page.name!r}, 'exec'), {{'__name__': 'snippet'}})")
    assert len(run) > 3
    command = [sys.executable, "-c", "\n".join(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
