"""The Colab notebook as a file."""

from __future__ import annotations

import json

from tests.helpers.notebook import NOTEBOOK, cells


def test_notebook_is_valid_and_has_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    assert NOTEBOOK.stat().st_size < 10_000
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    for number, source in enumerate(cells("code")):
        compile(source, f"cell {number}", "exec")
