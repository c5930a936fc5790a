"""The commit of the code that runs."""

from __future__ import annotations

import subprocess

import pytest

from rpt_jax.infra.source_commit import source_commit
from tests.helpers.paths import ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tests do not run in a clone")
def test_the_commit_is_that_of_the_clone() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(source_commit()).removesuffix("+changes") == head.stdout.strip()
