"""Suites that read two finished evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_jax.errors import UserError
from rpt_jax.evaluation.comparisons import compare_patterns, compare_results
from rpt_jax.evaluation.statistics import mcnemar_exact
from rpt_jax.evaluation.stored_results import RECORDS, SUMMARY, Record


def write(directory: Path, records: list[Record], suite: str = "questions") -> Path:
    """Write the files of a finished evaluation; return its directory."""
    directory.mkdir()
    (directory / SUMMARY).write_text(json.dumps({"suite": suite, "policy": directory.name}))
    (directory / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def records(scores: list[float], **others: Any) -> list[Record]:
    return [{"id": str(i), "category": "ab"[i % 2], "scores": {"accuracy": s}, **others} for i, s in enumerate(scores)]


def test_paired_comparison_of_two_policies(tmp_path: Path):
    rng = np.random.default_rng(0)
    a, b = (rng.random(80) < share for share in (0.3, 0.7))
    first = write(tmp_path / "first", records(a.astype(float).tolist()))
    second = write(tmp_path / "second", records(b.astype(float).tolist())[::-1])  # In another order.
    result = compare_results(first, second, tmp_path / "out")
    found = result["comparisons"]["accuracy"]
    assert found["difference"] == pytest.approx(b.mean() - a.mean())
    assert found["only_a"] == int(np.sum(a & ~b)) and found["only_b"] == int(np.sum(b & ~a))
    assert found["mcnemar_p"] == pytest.approx(mcnemar_exact(a, b)) and found["low"] > 0
    assert result["policies"] == ["first", "second"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result


def test_only_questions_of_both_evaluations_are_compared(tmp_path: Path):
    first = write(tmp_path / "first", records([1.0] * 10))
    second = write(tmp_path / "second", records([1.0] * 4 + [0.0] * 2))
    assert compare_results(first, second, tmp_path / "out")["comparisons"]["accuracy"]["count"] == 6


def test_evaluations_of_other_questions_cannot_be_compared(tmp_path: Path):
    first = write(tmp_path / "first", records([1.0]))
    second = write(tmp_path / "second", [{"id": "x", "category": "", "scores": {"accuracy": 1.0}}])
    with pytest.raises(UserError) as raised:
        compare_results(first, second, tmp_path / "out")
    assert raised.value.field == "--results"


def test_other_questions_by_the_same_names_are_not_compared(tmp_path: Path):
    first = write(tmp_path / "first", records([1.0, 0.0], question="1 + 1", answers=["2"]))
    second = write(tmp_path / "second", records([0.0, 0.0], question="8 * 8", answers=["64"]))
    with pytest.raises(UserError, match="'0' differs in its question"):
        compare_results(first, second, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (SUMMARY, b'{"suite": "quest'),
        (SUMMARY, b"\xff"),
        (SUMMARY, b"[]"),
        (SUMMARY, b"{}"),
        (RECORDS, b'{"id": "0"'),
        (RECORDS, b'{"id": "0"}\n'),
    ],
)
def test_a_damaged_evaluation_is_not_compared(tmp_path: Path, file: str, content: bytes):
    first, second = (write(tmp_path / name, records([1.0])) for name in ("first", "second"))
    (second / file).write_bytes(content)
    with pytest.raises(UserError, match=f"a file in {second} is damaged") as raised:
        compare_results(first, second, tmp_path / "out")
    assert raised.value.field == "--results"


def test_patterns_of_two_evaluations(tmp_path: Path):
    first = write(tmp_path / "first", records([1.0, 0.0], responses=["Wait.", "Probably 4."]))
    second = write(tmp_path / "second", records([1.0, 0.0], responses=["probably", "Something like 4."]), "next_token")
    result = compare_patterns(first, second, tmp_path / "out")
    assert result["first"]["substring"]["hypothesis"]["mean"] == 0.5
    assert result["second"]["word"]["hypothesis"]["mean"] == 1.0
    assert result["second"]["substring"]["reflection"]["mean"] == 0.0
    assert result["first"]["responses"] == 4 and 0 < result["first"]["distinct-1"] <= 1
    assert (tmp_path / "out" / "patterns.png").read_bytes().startswith(b"\x89PNG")


def test_longer_responses_are_not_less_distinct_for_their_length(tmp_path: Path):
    first = write(tmp_path / "first", records([1.0, 0.0], responses=["a b"]))
    second = write(tmp_path / "second", records([1.0, 0.0], responses=["a b c d"]))
    result = compare_patterns(first, second, tmp_path / "out")
    # Four words of each. Without replacement, one of the four pairs of equal words is missed with probability 15 / 70.
    assert result["first"]["distinct-1"] == pytest.approx(2 / 4)
    assert result["second"]["distinct-1"] == pytest.approx(1 - 15 / 70)


def test_patterns_need_responses(tmp_path: Path):
    first = write(tmp_path / "first", records([1.0], responses=["a"]))
    second = write(tmp_path / "second", records([1.0]), "multiple_choice_likelihood")
    with pytest.raises(UserError) as raised:
        compare_patterns(first, second, tmp_path / "out")
    assert raised.value.field == "--results"
