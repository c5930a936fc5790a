"""The results file of a study: what is written is read back, and a damaged or foreign file is refused by its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.errors import UserError
from rpt_jax.study.outcome import Arm, Failure, Score, Unit, read_outcomes, write_outcomes
from tests.helpers.study import large_study, outcome, study


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = large_study()
    write_outcomes(written, tmp_path / "results.json")
    assert read_outcomes(tmp_path / "results.json") == written


DELETE = object()


def changed(values: Any, path: tuple[str | int, ...], value: object) -> Any:
    """Return JSON values with the entry at a path replaced or deleted."""
    container = values
    for key in path[:-1]:
        container = container[key]
    if value is DELETE:
        del container[path[-1]]
    else:
        container[path[-1]] = value
    return values


SCORE = ("outcomes", 0, "scores", "direct/hard")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("outcomes",), DELETE),
        (("outcomes",), {}),
        (("outcomes", 0, "seed"), "0"),
        (("outcomes", 0, "seed"), DELETE),
        (("outcomes", 0, "flops"), float("nan")),
        (("outcomes", 0, "flops"), -1.0),
        (("outcomes", 0, "speed"), 1.0),
        (("outcomes", 0, "arm"), "unknown"),
        (("outcomes", 5, "budget"), 0.0),
        (("outcomes", 1, "seed"), 0),
        (SCORE, 0.5),
        ((*SCORE, "value"), 1.5),
        ((*SCORE, "value"), float("nan")),
        ((*SCORE, "low"), 0.99),
        ((*SCORE, "count"), 0),
        (("references",), ["unknown"]),
        (("matched_by",), "hours"),
        (("arms", 0, "name"), None),
        (("arms", 1, "name"), "base"),
        (("missing", 0, "arm"), "unknown"),
    ],
)
def test_a_wrong_value_is_refused_with_the_file(tmp_path: Path, path: tuple[str | int, ...], value: object) -> None:
    file = tmp_path / "results.json"
    write_outcomes(large_study(), file)
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(UserError) as raised:
        read_outcomes(file)
    assert raised.value.field == str(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"format": 4, "version": "0.1.0", "before": {}}', "\udcff"])
def test_a_foreign_or_damaged_file_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError) as raised:
        read_outcomes(file)
    assert raised.value.field == str(file)
    with pytest.raises(UserError) as raised:
        read_outcomes(tmp_path / "absent.json")
    assert raised.value.field == str(tmp_path / "absent.json")


def test_a_unit_is_finished_failed_or_missing_but_not_two_of_them() -> None:
    finished = outcome("rpt", 0, 1e12, 0.5)
    with pytest.raises(ValueError, match="rpt, seed 0"):
        study([finished], missing=(finished.unit,))
    with pytest.raises(ValueError, match="rpt, seed 0"):
        study([finished], failures=(Failure("rpt", 0, 1e12, "training", "", ""),))
    assert study([finished], missing=(Unit("rpt", 1, 2e12),)).budgets() == [1e12, 2e12]


def test_values_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="base"):
        study([], arms=("base", "base"))
    with pytest.raises(ValueError, match="score"):
        Score(0.5, 0.6, 0.4, 10)
    assert dataclasses.asdict(Arm("base")) == {"name": "base", "description": ""}
