"""Tests use the public API of the package only, and do not depend on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

MODULES = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py")
NAMED_TUPLE = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}  # Public, in spite of their underscores.
PATCHES = {"getattr", "setattr", "delattr"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_private(dotted: str) -> bool:
    """Return whether a part of a dotted name begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of every import from the package or the tests."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (full for full in names if full.partition(".")[0] in ("rpt_jax", "tests"))


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield private names that are imported from the package, read as an attribute, or patched by their name."""
    yield from (full for full in imports(tree) if is_private(full))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in NAMED_TUPLE:
            yield ast.unparse(node)
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            words = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if function in PATCHES and any(map(is_private, words)):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from rpt_jax.train import run", 0),
        ("from rpt_jax.bench.__main__ import main", 0),
        ("batch._replace(x=1)", 0),
        ("from rpt_jax.train import _run", 1),
        ("import rpt_jax._train", 1),
        ("train._run()", 1),
        ("monkeypatch.setattr(train, '_run', None)", 1),
        ("monkeypatch.setattr('rpt_jax.train._run', None)", 1),
    ],
)
def test_the_scan_finds_private_names(code: str, found: int) -> None:
    assert len(list(private_names(ast.parse(code)))) == found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_test_uses_public_names_and_helpers_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no module docstring"
    assert not list(private_names(tree))
    test_modules = [full for full in imports(tree) if any(part.startswith("test_") for part in full.split("."))]
    assert not test_modules, "move what is shared to tests/helpers/"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "slow"], ids=name)
def test_tests_in_the_folder_slow_are_marked_slow(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if any(isinstance(node, ast.Assign) and ast.unparse(node) == "pytestmark = pytest.mark.slow" for node in tree.body):
        return
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert all("pytest.mark.slow" in map(ast.unparse, test.decorator_list) for test in tests)


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent.name != "slow" and path.name != "parameters.py"], ids=name
)
def test_tests_outside_of_the_folder_slow_are_quick(path: Path) -> None:
    """Or some of their parameters are, which only `mostly_slow` marks."""
    marks = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert "pytest.mark.slow" not in map(ast.unparse, marks)
