"""The cells of the Colab notebook."""

from __future__ import annotations

import json

from tests.helpers.paths import ROOT

NOTEBOOK = ROOT / "launch" / "colab_tpu.ipynb"


def cells(kind: str) -> list[str]:
    """Return the sources of the notebook's cells of a type, "code" or "markdown"."""
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]
