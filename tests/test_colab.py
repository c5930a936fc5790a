"""The notebooks for Colab and Kaggle as files. tests/slow/test_colab.py runs their cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.notebook import COLAB, KAGGLE, cells


@pytest.mark.parametrize("path", [COLAB, KAGGLE], ids=lambda path: path.stem)
def test_notebook_is_valid_and_has_no_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    assert path.stat().st_size < 10_000
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    for number, source in enumerate(cells("code", path)):
        compile(source, f"cell {number}", "exec")


def test_both_notebooks_have_the_same_cells_after_the_first() -> None:
    """What tests/slow/test_colab.py finds of the one is true of the other."""
    assert cells("code", KAGGLE) == cells("code", COLAB)
    assert cells("markdown", KAGGLE)[1:] == cells("markdown", COLAB)[1:]
