"""The table at the end of a run: before and after training in one."""

from __future__ import annotations

from typing import Any

import pytest

from rpt_jax.evaluation.questions import show_question_results
from rpt_jax.results import show_next_token_evaluations


def level(accuracy: float, positions: int = 9) -> dict[str, Any]:
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "positions": positions}


def next_token_evaluation(accuracy: float) -> dict[str, Any]:
    levels = {"easy": level(accuracy), "medium": level(accuracy), "hard": level(0.0, positions=0)}
    modes = {"direct": levels, "reasoning": levels}
    return {**modes, "unseen": modes, "details": {"format_rate": 1.0, "response_length": 12.0}}


def question_results(accuracy: float) -> dict[str, Any]:
    average = {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "count": 5}
    return {
        "samples": 4,
        "questions": 10,
        "accuracy": {"micro": average, "categories": {"sums": average, "products": average}},
        "pass": {"1": average, "4": average},
        **{"format_rate": 1.0, "response_length": 12.0, "truncated": 0.0, "timed_out": 0, "crashed": 0},
    }


def rows_of(printed: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_next_tokens_before_and_after_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_next_token_evaluations({"before": next_token_evaluation(0.2), "after": next_token_evaluation(0.4)})
    rows = rows_of(capsys.readouterr().out)
    names = [f"{mode}{split}" for split in ("", ", unseen") for mode in ("direct", "reasoning")]
    assert list(rows) == [f"{name}, {when}" for name in names for when in ("before", "after")]
    assert rows["reasoning, before"] == ["20.0 (10.0-30.0), 9", "20.0 (10.0-30.0), 9", "no positions"]
    assert rows["direct, unseen, after"][0] == "40.0 (30.0-50.0), 9"


def test_questions_before_and_after_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_question_results({"before": question_results(0.2), "after": question_results(0.4)})
    rows = rows_of(capsys.readouterr().out)
    measures = ["avg@4", "pass@4", "avg@4, sums", "avg@4, products"]
    assert list(rows) == [f"{measure}, {when}" for measure in measures for when in ("before", "after")]
    assert rows["pass@4, after"] == ["40.0 (30.0-50.0)", "10"] and rows["avg@4, sums, before"][1] == "5"
