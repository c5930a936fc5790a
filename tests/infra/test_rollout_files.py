"""Files of kept rollouts: their content, resuming, and failing writes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rpt_jax.infra import rollout_files
from rpt_jax.infra.rollout_files import EVALUATION, TRAINING, RolloutFiles, read_table
from tests.helpers.run_pages import make_rollouts, training_files


def add(files: RolloutFiles, *steps: int) -> None:
    for step in steps:
        files.add_training(step, lambda step=step: make_rollouts(step, 2, 3, split="train"))


def evaluate(files: RolloutFiles, step: int) -> None:
    with files.evaluation(step) as keep:
        keep(EVALUATION, lambda: make_rollouts(step, 4, 3, split="held_out"))
        keep(EVALUATION, lambda: make_rollouts(step, 2, 3, split="unseen"))


def test_a_file_holds_the_steps_of_an_interval(tmp_path: Path) -> None:
    with RolloutFiles(tmp_path, -1, 3, evaluations=True) as files:
        evaluate(files, 0)
        add(files, 1, 2, 3, 4)
    assert list(training_files(tmp_path)) == [
        "evaluation_000000.parquet",
        "training_000001.parquet",
        "training_000004.parquet",
    ]
    found = rollout_files.rollout_files(tmp_path, TRAINING)
    assert [sorted(set(read_table(path)["step"].to_pylist())) for path in found.values()] == [[1, 2, 3], [4]]
    assert read_table(tmp_path / "rollouts" / "evaluation_000000.parquet").num_rows == 18


@pytest.mark.parametrize("saved", range(6))
def test_a_resumed_run_leaves_the_same_files(tmp_path: Path, saved: int) -> None:
    """It goes on after step `saved`, while the files have two steps more and an evaluation of the last of them."""
    with RolloutFiles(tmp_path / "whole", -1, 3, evaluations=True) as files:
        evaluate(files, 0)
        add(files, *range(1, 9))
        evaluate(files, 8)
    with RolloutFiles(tmp_path / "run", -1, 3, evaluations=True) as files:
        evaluate(files, 0)
        add(files, *range(1, saved + 3))
        evaluate(files, saved + 2)
    with RolloutFiles(tmp_path / "run", saved, 3, evaluations=True) as files:
        add(files, *range(saved + 1, 9))
        evaluate(files, 8)
    assert training_files(tmp_path / "run") == training_files(tmp_path / "whole")


def test_flush_writes_an_interval_that_is_not_complete(tmp_path: Path) -> None:
    with RolloutFiles(tmp_path, -1, 50, evaluations=True) as files:
        add(files, 1, 2)
        files.flush()
        assert read_table(tmp_path / "rollouts" / "training_000001.parquet").num_rows == 12
        add(files, 3)
    assert read_table(tmp_path / "rollouts" / "training_000001.parquet").num_rows == 18


@pytest.mark.parametrize("interval", [1, 50])
def test_a_full_disk_is_a_warning_and_rows_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interval: int
) -> None:
    def fail(path: Path, table: object) -> None:
        raise OSError(28, "No space left on device")

    with RolloutFiles(tmp_path, -1, interval, evaluations=True) as files:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(rollout_files, "write_table", fail)
            add(files, 1)
            evaluate(files, 1)
            files.flush()
        assert "No space left" in caplog.text and not list((tmp_path / "rollouts").iterdir())
        add(files, 2)
    steps = [read_table(path)["step"].to_pylist() for path in rollout_files.rollout_files(tmp_path, TRAINING).values()]
    assert [sorted(set(of_file)) for of_file in steps] == ([[1], [2]] if interval == 1 else [[1, 2]])
    assert read_table(tmp_path / "rollouts" / "evaluation_000001.parquet").num_rows == 18


def test_an_error_in_the_thread_is_raised(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("column")

    files = RolloutFiles(tmp_path, -1, 50, evaluations=True)
    files.add_training(1, fail)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError):
        files.close()


def test_a_damaged_file_is_set_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "training_000001.parquet").write_bytes(b"PAR1 half")
    with RolloutFiles(tmp_path, 2, 50, evaluations=True) as files:
        add(files, 3)
    assert "is damaged" in caplog.text
    found = training_files(tmp_path)
    assert list(found) == ["training_000001.parquet.damaged", "training_000003.parquet"]
    assert found["training_000001.parquet.damaged"] == b"PAR1 half"


def test_a_resumed_run_leaves_files_of_others_alone(tmp_path: Path) -> None:
    with RolloutFiles(tmp_path, -1, 2, evaluations=True) as files:
        add(files, 1, 2, 3)
    mine = tmp_path / "rollouts" / "my_labels_2024.parquet"
    mine.write_text("mine")
    RolloutFiles(tmp_path, 2, 2, evaluations=True).close()
    assert mine.read_text() == "mine" and "training_000003.parquet" not in training_files(tmp_path)


def test_evaluations_are_not_kept_if_the_config_says_so(tmp_path: Path) -> None:
    with RolloutFiles(tmp_path, -1, 50, evaluations=False) as files:
        evaluate(files, 0)
    assert not (tmp_path / "rollouts").exists()
