"""XLA knows the flags that commands add for a GPU; it aborts at an unknown one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax.infra.gpu_settings import exclude_nondeterministic_operations, set_gpu_defaults

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("flags", ["", "--xla_gpu_no_such_flag=1"])
def test_xla_knows_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    set_gpu_defaults(environment)
    exclude_nondeterministic_operations(environment)
    assert environment["XLA_FLAGS"].count("--xla_gpu") == (2 if not flags else 3)
    program = "import jax; jax.jit(lambda x: x + 1)(1)"
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (finished.returncode == 0) == (not flags)
