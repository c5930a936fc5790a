"""The container image, built where a Docker daemon is at hand, as in CI."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

IMAGE = "rpt_jax_test"


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_image_builds_and_describes_a_run() -> None:
    if not shutil.which("docker") or docker("info").returncode:
        pytest.skip("needs a Docker daemon")
    built = docker("build", "-f", "launch/Containerfile", "-t", IMAGE, ".")
    assert built.returncode == 0, built.stderr
    # On a machine without a TPU.
    ran = docker("run", "--rm", "-e", "JAX_PLATFORMS=cpu", IMAGE, "--config=configs/rpt_tiny.py", "--describe")
    assert ran.returncode == 0, ran.stderr
    assert "matmul parameters" in ran.stdout
