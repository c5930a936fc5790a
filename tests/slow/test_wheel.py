"""The package as a user installs it: a wheel from a clean clone, in an empty environment, without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rpt_jax
from tests.helpers.paths import CONFIGS, ROOT

pytestmark = pytest.mark.slow

# Two steps of the tiny run, with small corpora and evaluations.
FIELDS = {
    "data.source_options.documents": 60,
    "data.held_out_documents": 20,
    "data.source_options.held_out_templates": 2,
    "data.positions_per_window": 4,
    "data.max_document_tokens": 128,
    "prompt.max_tokens": 128,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 8,
    "training.prompts_per_step": 4,
    "training.total_steps": 2,
    "training.dynamic_sampling_from": 2,
    "evaluation.every_steps": 2,
    "evaluation.positions": 8,
    "evaluation.unseen_positions": 4,
    "checkpoint.every_steps": 2,
}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the settings of the test's own environment. Returns: its stdout."""
    hidden = ("PYTHON", "PYTEST", "VIRTUAL_ENV", "RPT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run("git", "clone", "--quiet", ROOT, directory / "clone", cwd=directory)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", directory / "dist", directory / "clone", cwd=directory)
    [wheel] = (directory / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the commands of a new environment that has the wheel and its dependencies."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", directory / "venv", cwd=directory)
    scripts = directory / "venv" / "bin"
    run(scripts / "python", "-m", "pip", "install", "--quiet", wheel, cwd=directory)
    return scripts


def test_wheel_holds_the_package_and_the_configs_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in CONFIGS.glob("*.py"):
        assert f"rpt_jax/configs/{config.name}" in names
    policy = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")
    for file in policy:
        assert f"rpt_jax/configs/tiny/{file}" in names
    assert {name.partition("/")[0] for name in names} == {"rpt_jax", f"rpt_jax-{rpt_jax.__version__}.dist-info"}


def test_installed_command_prints_its_version(scripts: Path, tmp_path: Path) -> None:
    assert run(scripts / "rpt", "--version", cwd=tmp_path) == f"{rpt_jax.__version__}\n"


def test_installed_package_trains_the_packaged_tiny_config(scripts: Path, tmp_path: Path) -> None:
    overrides = [f"--config.{field}={value}" for field, value in FIELDS.items()]
    run(scripts / "rpt", "train", "--config=configs/rpt_tiny.py", "--workdir=run", *overrides, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["run"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"before", "after"} <= result.keys()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in metrics) == FIELDS["training.total_steps"]
