"""Where config files are found, and what they can import."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax.config import load_config_file
from rpt_jax.config.loading import load_study, resolve_config_path
from rpt_jax.errors import UserError
from tests.helpers.paths import CONFIGS, EXPERIMENTS

CONFIG = """
from rpt_jax.config import default_config

def get_config():
    config = default_config()
    config.seed = {seed}
    return config
"""


def test_packaged_config_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_config_path("configs/rpt_tiny.py") == str(CONFIGS / "rpt_tiny.py")
    assert load_config_file("configs/rpt_tiny.py")["task"] == "rpt"


def test_file_in_the_current_directory_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "rpt_tiny.py").write_text(CONFIG.format(seed=41))
    assert load_config_file("configs/rpt_tiny.py")["seed"] == 41


def test_unknown_config_is_refused_with_the_nearest_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        load_config_file("configs/rpt_tinny.py")
    assert raised.value.field == "--config"
    assert "Did you mean 'configs/rpt_tiny.py'?" in str(raised.value)


def test_other_missing_paths_are_not_looked_up_in_the_package() -> None:
    assert resolve_config_path("other/rpt_tiny.py") == "other/rpt_tiny.py"
    assert resolve_config_path("/configs/rpt_tiny.py") == "/configs/rpt_tiny.py"


def test_config_file_can_import_a_module_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "base_of_loading_test.py").write_text(CONFIG.format(seed=5))
    (tmp_path / "derived.py").write_text("from base_of_loading_test import get_config\n")
    assert load_config_file(str(tmp_path / "derived.py"))["seed"] == 5


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_packaged_config_loads_from_any_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config_file(f"configs/{path.name}")["task"]


def test_the_config_of_a_study_and_of_a_run_are_told_apart() -> None:
    with pytest.raises(UserError, match=r"run it with python -m rpt_jax\.study --config=configs/study_tiny\.py"):
        load_config_file("configs/study_tiny.py")
    with pytest.raises(UserError, match=r"run it with python -m rpt_jax\.main --config=configs/rpt_tiny\.py"):
        load_study("configs/rpt_tiny.py")


def test_a_study_without_a_study_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def get_config():\n    return None\n")
    with pytest.raises(UserError, match="returns a StudyConfig") as raised:
        load_study(str(tmp_path / "mine.py"))
    assert raised.value.field == "--config"
