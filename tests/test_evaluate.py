"""The command that evaluates a policy: what it refuses, and one suite from the files to the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpt_jax import evaluate
from tests.helpers.evaluation import question_flags
from tests.helpers.paths import CONFIGS, TINY

CONFIG = f"--config={CONFIGS / 'rft_tiny.py'}"


def run(*arguments: str) -> int:
    return evaluate.main(["evaluate", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG], "--suite is missing: give one of altered_reasoning, compare, multiple_choice,"),
        (["--suite=multiple_choise", CONFIG], "Did you mean 'multiple_choice'?"),
        (["--suite=questions"], "--config is missing"),
        (["--suite=questions", CONFIG, "--results=a,b"], "--results has no effect"),
        (["--suite=questions", f"--config={CONFIGS / 'rpt_tiny.py'}"], "task='rpt'"),
        (["--suite=next_token", CONFIG], "task='rft'"),
        (["--suite=questions", CONFIG, "--policy=nowhere"], "--policy='nowhere' does not exist"),
        (["--suite=questions", CONFIG, "--config.policy.path=nowhere"], "policy.path='nowhere' does not exist"),
        (["--suite=questions", CONFIG, "--policy=gs:/bucket/policy"], "URL"),
        (
            ["--suite=next_token", f"--config={CONFIGS / 'rpt_tiny.py'}", "--config.evaluation.keep_rollouts=False"],
            "no effect",
        ),
        (["--suite=compare", "--results=a"], "two finished evaluations"),
        (["--suite=compare", "--results=a,b"], "a is not the --workdir of a finished evaluation"),
        (["--suite=patterns", "--results=a,b", CONFIG], "--config has no effect"),
        (["--suite=patterns", "--results=a,b", "--config.seed=1"], "no effect"),
    ],
)
def test_bad_command_lines_are_explained(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_suite_of_likelihoods_from_the_questions_to_the_results(tmp_path: Path, capsys):
    workdir = tmp_path / "out"
    flags = ["--suite=multiple_choice_likelihood", CONFIG, f"--policy={TINY}", f"--workdir={workdir}"]
    flags += question_flags(tmp_path)
    assert run(*flags) == 0
    summary = json.loads((workdir / "evaluation.json").read_text())
    records = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"questions.jsonl:{i}" for i in (1, 2, 3)]
    assert [record["answers"] for record in records] == [["B"], ["B"], ["A"]]
    for measure, result in summary["scores"].items():
        right = [record["chosen"][measure] in record["answers"] for record in records]
        assert result["micro"]["mean"] == pytest.approx(sum(right) / 3)
        assert result["macro"]["mean"] == pytest.approx((sum(right[:2]) / 2 + right[2]) / 2)
        assert set(result["categories"]) == {"sums", "products"}
    assert (
        summary["suite"] == "multiple_choice_likelihood" and summary["config"]["questions.choices_field"] == "options"
    )
    assert 0 < summary["device_busy"] <= 1
    rejected = [json.loads(line) for line in (workdir / "rejected_questions.jsonl").read_text().splitlines()]
    assert [line["line"] for line in rejected] == [4]

    # The same command shows the results again, also where the config's own policy is another one; other settings are refused.
    before = (workdir / "evaluation.json").read_bytes()
    assert run(*flags, "--config.policy.path=elsewhere") == 0 and (workdir / "evaluation.json").read_bytes() == before
    capsys.readouterr()
    assert run(*flags, "--config.questions.test_questions=2") == 2
    assert "questions.test_questions: 0 there, 2 now" in capsys.readouterr().err
