"""What README.md says of the tree and of the equations is true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_lists_every_module_config_and_launcher() -> None:
    files = {
        str(path.relative_to(ROOT / top))
        for top, pattern in (("rpt_jax", "**/*.py"), ("configs", "*.py"), ("launch", "*"))
        for path in (ROOT / top).glob(pattern)
        if path.is_file() and path.name != "__init__.py"
    }
    tree = README[README.index("## The tree") : README.index("## Limits")]
    listed = set(re.findall(r"^ {6}(\S+\.(?:py|sh|yaml|md|ipynb|png)|Containerfile) ", tree, re.MULTILINE))
    assert listed == files


def test_every_function_of_the_equation_table_exists() -> None:
    table = README[README.index("## The paper's equations") : README.index("## What was measured")]
    names = re.findall(r"`([a-z_.]+\.[a-z_]+)`", table)
    assert len(names) >= 9
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"rpt_jax.{module}"), function)), name
