"""README.md and docs/ point at things that exist, and every module says what it is."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax.config.reference import field_docs
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted([README, ROOT / "launch" / "README.md", *DOCS.rglob("*.md")])
MODULES = sorted(path for path in (ROOT / "rpt_jax").rglob("*.py") if path.name != "__init__.py")
# Stand for any field, or for an option of examples/custom_source.py.
PLACEHOLDERS = {"section.field", "data.source_options.pages"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_readme_fits_on_a_few_screens() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_every_equation_of_the_paper_is_an_existing_function() -> None:
    page = (DOCS / "concepts" / "rpt.md").read_text()
    table = page.partition("## Equations")[2].partition("\n## ")[0]
    names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", table)
    assert len(names) >= 9
    for function in names:
        module, _, attribute = function.rpartition(".")
        assert callable(getattr(importlib.import_module(f"rpt_jax.{module}"), attribute)), function


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = (page.parent / target.partition("#")[0]).resolve()
        if not re.match(r"[a-z]+:|#", target):
            assert path.exists(), target


def test_the_reward_of_the_readme_is_a_config_that_loads(tmp_path: Path) -> None:
    [code] = re.findall(
        r"^```python\n(from rpt_jax.config import.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    config = tmp_path / "my_config.py"
    config.write_text(code)
    # In a separate process, because it registers a reward.
    run = [sys.executable, "-m", "rpt_jax.main", f"--config={config}", "--describe"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_flags_on_a_page_are_fields(page: Path) -> None:
    known = {document.name for document in field_docs()} | PLACEHOLDERS
    assert set(re.findall(r"--config\.([a-z_.0-9]+)=", page.read_text())) <= known


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_module_begins_with_one_line_that_says_what_it_is(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring, "no module docstring"
    assert docstring.splitlines()[0].strip(), "the first line of the docstring is empty"
