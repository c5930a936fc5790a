"""The difficulty filter: pass rates from a file, and the questions that it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError
from rpt_jax.questions.difficulty import DifficultyFilter, PassRate, read_pass_rates
from rpt_jax.questions.question import Question


def write(path: Path, passes: list[int]) -> str:
    lines = [json.dumps({"id": f"q{i}", "passes": n, "samples": 4, "policy": "x"}) for i, n in enumerate(passes)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [
        ({}, [1, 2, 3]),
        ({"min_passes": 2}, [2, 3]),
        ({"max_passes": 4}, [1, 2, 3, 4]),
        ({"min_passes": 0, "max_passes": 0}, [0]),
    ],
)
def test_questions_solved_between_two_numbers_of_times_are_kept(
    bounds: dict[str, int], kept: list[int], tmp_path: Path
) -> None:
    config = QuestionsConfig(pass_rates=write(tmp_path / "rates.jsonl", [0, 1, 2, 3, 4]), **bounds)
    is_kept = DifficultyFilter(config)
    assert [i for i in range(5) if is_kept(Question(id=f"q{i}", text="?", answers=("1",)))] == kept
    assert not is_kept(Question(id="not measured", text="?", answers=("1",)))


def test_bounds_above_the_number_of_samples_are_refused(tmp_path: Path) -> None:
    config = QuestionsConfig(pass_rates=write(tmp_path / "rates.jsonl", [0, 1]), min_passes=5)
    with pytest.raises(UserError) as raised:
        DifficultyFilter(config)
    assert raised.value.field == "questions.min_passes"


@pytest.mark.parametrize(
    "text", ["", "{\n", "[]\n", '{"id": "a", "passes": 3, "samples": 2}\n', '{"id": "a", "passes": 1}\n', "\udcff"]
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="rates.jsonl") as raised:
        read_pass_rates(path)
    assert raised.value.field == "questions.pass_rates"


def test_pass_rates_are_read_by_id(tmp_path: Path) -> None:
    rates = read_pass_rates(Path(write(tmp_path / "rates.jsonl", [3])))
    assert rates == {"q0": PassRate(passes=3, samples=4)}
