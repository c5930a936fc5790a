"""The cells of the notebooks for Colab and Kaggle."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.paths import ROOT

COLAB = ROOT / "launch" / "colab_tpu.ipynb"
KAGGLE = ROOT / "launch" / "kaggle.ipynb"


def cells(kind: str, notebook: Path = COLAB) -> list[str]:
    """Return the sources of a notebook's cells of a type, "code" or "markdown"."""
    content = json.loads(notebook.read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]
