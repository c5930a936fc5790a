"""Runs with segments as targets, from the corpus to the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpt_jax import main
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.rollout_files import TEXT, read_table
from tests.helpers.runs import SHORT, assert_resumes, experiment

SEGMENTS: dict[str, Any] = SHORT | {
    "data.targets": "segment",
    "data.positions": "every",
    "prompt.reference_bytes": 128,
    "objective.reward": "segment_common_prefix",
    "checkpoint.every_steps": 1,
}
MASKED: dict[str, Any] = SEGMENTS | {
    "data.target_options.tokens": 20,
    "data.target_options.right_context": 8,
    "data.min_context": 16,  # The unseen documents have few sentences behind more tokens.
    "data.workers": 1,
    "prompt.max_tokens": 256,
}


@pytest.mark.slow
def test_a_run_with_masked_sentences_resumes_and_reports_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.txt"
    template.write_text("{context} ... {right_context}\n")
    fields: dict[str, object] = {**MASKED, "prompt.template": str(template)}
    whole = tmp_path / "whole"
    main.run(experiment(**MASKED, **{"prompt.template": str(template)}), whole)
    first, *_, last = read_metrics(whole / "metrics.jsonl")
    result = json.loads((whole / "result.json").read_text())
    for name in DIFFICULTIES:
        for line, part in ((first, "before"), (last, "after")):
            exact = result["details"][part]["exact"][name]
            assert exact["positions"] == result[part]["reasoning"][name]["positions"]
            assert not exact["positions"] or line[f"eval/exact/{name}"] == exact["accuracy"]
            assert not exact["positions"] or exact["accuracy"] <= result[part]["reasoning"][name]["accuracy"]
    # The context of a kept rollout ends before the segment.
    contexts = [
        context
        for path in (whole / "rollouts").glob("*.parquet")
        if not path.name.startswith(TEXT)
        for context in read_table(path, ["context"])["context"].to_pylist()
    ]
    assert contexts and not any(" ... " in context for context in contexts)
    assert_resumes(fields, 1, whole, tmp_path / "resumed", monkeypatch)


@pytest.mark.slow
def test_segments_are_verified_by_the_verifiers_of_questions(tmp_path: Path) -> None:
    fields: dict[str, Any] = SEGMENTS | {
        "data.target_options.unit": "tokens",
        "data.target_options.tokens": 1,
        "objective.reward": "verified",
        "questions.verifier": "boxed_exact",
        "questions.verifier_workers": 1,
    }
    main.run(experiment(**fields), tmp_path)
    for line in read_metrics(tmp_path / "metrics.jsonl")[1:]:
        assert line["reward/mean"] == pytest.approx(line["status/correct"])
        assert line["status/wrong"] + line["status/correct"] > 0
        assert line["verification/crashed"] == line["verification/timed_out"] == 0


@pytest.mark.slow
def test_traces_of_segments_are_accepted_by_prefix(tmp_path: Path) -> None:
    fields: dict[str, Any] = SEGMENTS | {"data.target_options.unit": "tokens", "data.target_options.tokens": 2}
    changed = {name: value for name, value in fields.items() if name.partition(".")[0] in ("data", "prompt", "rollout")}
    traces = {"task": "traces", "traces.total_prompts": 8, "training.prompts_per_step": 8}
    main.run(experiment(**changed, **traces), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accepted"] == result["status"]["correct"]
