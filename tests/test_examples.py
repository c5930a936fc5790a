"""The examples are short, and each has a page."""

from __future__ import annotations

from tests.helpers.examples import PAGES
from tests.helpers.paths import ROOT


def test_every_example_has_a_page_and_is_short() -> None:
    examples = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert examples.keys() == PAGES.keys()
    assert all(len(path.read_text().splitlines()) < 40 for path in examples.values())
