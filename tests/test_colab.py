"""The notebooks for Colab and Kaggle as files. tests/slow/test_colab.py runs their cells."""

from __future__ import annotations

import json
import subprocess
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


class Installed:
    """A stand-in for a Python process: `convert` creates its target, and fails if it exists."""

    def __init__(self, command: list[str], **_: object):
        self.stdout: list[str] = []
        self.returncode = 0
        if "rpt_jax.convert" in command:
            Path(command[-1].removeprefix("--to=")).mkdir(parents=True)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        """End."""


def test_the_cells_run_again_after_a_restart_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: Path(command[-1]).mkdir())
    monkeypatch.setattr(subprocess, "Popen", Installed)
    settings, install, *_, export = cells("code")
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        namespace: dict[str, object] = {}
        for source in (settings, install, export):
            exec(compile(source, "cell", "exec"), namespace)
        assert Path.cwd() == tmp_path / "repository" and Path("exported/smollm2").is_dir()
