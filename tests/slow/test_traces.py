"""Small runs of task "traces": they resume, and pre-training learns what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.prompts.sampled_traces import batch_path, read_batch, read_traces
from tests.helpers.questions import SMALL_RFT
from tests.helpers.runs import PRETRAIN, SMALL, experiment

pytestmark = pytest.mark.slow

READ_BY_TRACES = ("data.", "prompt.", "rollout.", "training.prompts_per_step")
TRACES = {
    **{field: value for field, value in SMALL.items() if field.startswith(READ_BY_TRACES)},
    "task": "traces",
    "traces.total_prompts": 20,
    "traces.kept_per_prompt": 2,
    "data.entropy_threshold": 0.1,
}
QUESTIONS = {
    **{field: value for field, value in SMALL_RFT.items() if field.startswith(("questions.", *READ_BY_TRACES[1:]))},
    "task": "traces",
    "traces.prompts": "questions",
    "traces.total_prompts": 12,
}


def test_a_run_resumes_to_the_same_traces_and_its_traces_can_be_learned(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    main.run(experiment("rpt_tiny", **TRACES), workdir)
    result = json.loads((workdir / "result.json").read_text())
    assert result["prompts"] == 20 and result["responses"] == 80 and result["devices"] == 1
    files = [batch_path(workdir, n) for n in range(3)]
    batches = [read_batch(path, "--workdir") for path in files]
    assert [batch.header["prompts"] for batch in batches] == [8, 8, 4]
    traces = [trace for batch in batches for trace in batch.traces]
    places = {(trace["window"], trace["position"]) for trace in traces}
    assert len(traces) == result["kept"] >= len(places) > 0
    assert all(trace["response_text"].rpartition("\\boxed{")[1] for trace in traces)

    # A batch that is missing is sampled again, to the same responses.
    files[1].unlink()
    (workdir / "result.json").unlink()
    main.run(experiment("rpt_tiny", **TRACES), workdir)
    assert [read_batch(path, "--workdir").traces for path in files] == [batch.traces for batch in batches]
    again = json.loads((workdir / "result.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}

    # Those of other sampling are not mixed in.
    with pytest.raises(UserError, match="another sampling") as raised:
        main.run(experiment("rpt_tiny", **TRACES | {"rollout.temperature": 0.5}), workdir, force=True)
    assert raised.value.field == "--workdir"

    # Pre-training learns them.
    changes = {name: value for name, value in PRETRAIN.items() if not name.startswith("optimizer")}
    sampled = {
        "task": "pretrain",
        "data.source_options.held_out_templates": 2,
        "pretrain.traces": "sampled",
        "pretrain.trace_options.path": workdir,
        "pretrain.traces_per_window": 2,
        "pretrain.row_tokens": 192,
    }
    main.run(experiment("rpt_tiny", **changes | sampled), tmp_path / "sft")
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert all(line["loss/trace"] > 0 and line["update/skipped"] == 0 for line in lines)
    assert lines[-1]["flops/train_total"] > lines[0]["flops/train_total"] > 0

    # A run that is resumed notices other traces in their place.
    next(path for path, batch in zip(files, batches, strict=True) if batch.traces).unlink()
    read_traces.cache_clear()
    with pytest.raises(UserError) as raised:
        main.run(experiment("rpt_tiny", **changes | sampled | {"training.total_steps": 4}), tmp_path / "sft")
    assert raised.value.field == "pretrain.trace_options.path"


def test_the_verifier_decides_which_answers_are_kept(tmp_path: Path) -> None:
    """The policy solves few of the questions; a prompt is the whole question in its template."""
    main.run(experiment("rft_tiny", **QUESTIONS), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    batches = [read_batch(batch_path(tmp_path, n), "--workdir") for n in range(2)]
    assert [batch.header["prompts"] for batch in batches] == [8, 4]
    assert {batch.header["accepted_by"] for batch in batches} == {"boxed_exact"}
    assert result["responses"] == 48 == sum(result["status"].values())
    kept = [trace["question"] for batch in batches for trace in batch.traces]
    assert len(kept) == len(set(kept)) == result["kept"] == result["solved"]
