"""What README.md says of the tree and of the equations is true."""

from __future__ import annotations

import importlib
import re

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_every_function_of_the_equation_table_exists() -> None:
    table = README[README.index("## The paper's equations") : README.index("## What was measured")]
    names = re.findall(r"`([a-z_.]+\.[a-z_]+)`", table)
    assert len(names) >= 9
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"rpt_jax.{module}"), function)), name
