"""The difficulty filter: pass rates from a file, and the questions that it keeps."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError
from rpt_jax.questions.difficulty import DifficultyFilter, question_digest, read_pass_rates
from rpt_jax.questions.question import Question

SAMPLES = 4
MEASURED_WITH = {
    "policy": "a",
    "tokenizer": "b",
    "verifier": "boxed_exact",
    "sampling": {"seed": 0, "prompt.template": "{question}", "rollout.samples_per_prompt": SAMPLES},
}
QUESTIONS = [Question(id=f"q{i}", text=f"{i}?", answers=("1",)) for i in range(5)]


def write(path: Path, passes: Sequence[int], **header: Any) -> str:
    rates = [
        {"id": question.id, "question": question_digest(question), "passes": n, "samples": SAMPLES}
        for question, n in zip(QUESTIONS, passes, strict=False)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [{**MEASURED_WITH, **header}, *rates]))
    return str(path)


def refused(config: QuestionsConfig, questions: Sequence[Question] = QUESTIONS) -> UserError:
    with pytest.raises(UserError) as raised:
        DifficultyFilter(config, MEASURED_WITH)(questions)
    return raised.value


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
    not_measured = Question(id="not measured", text="?", answers=("1",))
    chosen = DifficultyFilter(config, MEASURED_WITH)([*QUESTIONS, not_measured])
    assert chosen == [QUESTIONS[i] for i in kept]


@pytest.mark.parametrize(
    ("bounds", "field"),
    [
        ({"min_passes": 5}, "questions.min_passes"),
        ({"min_passes": 4}, "questions.min_passes"),  # The default of max_passes is 3 of 4.
        ({"max_passes": 5}, "questions.max_passes"),
    ],
)
def test_bounds_that_leave_no_question_are_refused(bounds: dict[str, int], field: str, tmp_path: Path) -> None:
    config = QuestionsConfig(pass_rates=write(tmp_path / "rates.jsonl", [0, 1]), **bounds)
    assert refused(config).field == field


def test_pass_rates_of_another_verifier_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.jsonl", [1, 2], verifier="contains")
    assert "contains" in str(refused(QuestionsConfig(pass_rates=path)))


def test_pass_rates_of_other_questions_are_refused(tmp_path: Path) -> None:
    config = QuestionsConfig(pass_rates=write(tmp_path / "rates.jsonl", [1, 2]))
    no_id_in_common = [Question(id="other.jsonl:1", text="0?", answers=("1",))]
    assert "other.jsonl:1" in str(refused(config, no_id_in_common))
    same_id_other_text = [Question(id="q0", text="0?", answers=("2",), place="questions.jsonl:1")]
    assert "questions.jsonl:1" in str(refused(config, same_id_other_text))


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"policy": "bigger"}, "policy"),
        ({"sampling": MEASURED_WITH["sampling"] | {"prompt.template": "Q: {question}"}}, "prompt.template"),
        ({"sampling": MEASURED_WITH["sampling"] | {"seed": 7, "rollout.samples_per_prompt": 16}}, ""),
    ],
)
def test_pass_rates_of_another_policy_or_sampling_are_used_with_a_warning(
    header: dict[str, Any], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = QuestionsConfig(pass_rates=write(tmp_path / "rates.jsonl", [0, 1], **header))
    with caplog.at_level(logging.WARNING, logger="rpt_jax"):
        assert DifficultyFilter(config, MEASURED_WITH)(QUESTIONS) == [QUESTIONS[1]]
    assert len(caplog.records) == bool(named) and named in caplog.text


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": "a", "question": "x", "passes": 3, "samples": 2}', '{"id": "a", "passes": 1}', "\udcff"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_file_is_refused(line: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    lines = [json.dumps(MEASURED_WITH), line][2 - number :]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"rates.jsonl(:\d|.* UTF-8)") as raised:
        read_pass_rates(path)
    assert raised.value.field == "questions.pass_rates"


@pytest.mark.parametrize("text", ["", json.dumps(MEASURED_WITH)])
def test_a_file_without_pass_rates_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_text(text)
    assert refused(QuestionsConfig(pass_rates=str(path))).field == "questions.pass_rates"
