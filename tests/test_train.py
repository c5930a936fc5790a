"""Small runs of the trainer: their outputs, how they resume, and how invalid input is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rpt_jax
from rpt_jax import main, pretrain, train
from rpt_jax.config import Experiment
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import MetricsWriter, read_metrics
from rpt_jax.infra.run_context import RunContext
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_policy
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL, comparable, experiment

SELF_ENTROPY = {"data.positions": "self_entropy", "data.rescore_every_steps": 2, "data.rescore_windows": 32}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment(**SMALL), workdir)
    return workdir


def test_each_program_is_compiled_once(finished: Path) -> None:
    """Shapes and shardings are the same in every step; dynamic sampling begins in step 3."""
    compiled = [line["time/compiled_programs"] for line in read_metrics(finished / "metrics.jsonl")]
    assert compiled[0] > 0 and compiled[1] > 0 and compiled[2] == 0 == compiled[4] == compiled[5], compiled


def test_a_run_leaves_metrics_result_plots_and_policy(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert "eval/reasoning/hard" in lines[0] and "eval/reasoning/hard" in lines[2] and "eval/reasoning/hard" in lines[5]
    assert all(line["mismatch/p99"] <= line["mismatch/max"] < 1e-4 for line in lines[1:])
    assert lines[-1]["flops/train_total"] > lines[1]["flops/train_total"] > 0
    rounds = [line["groups/rounds"] for line in lines[1:]]
    assert rounds[:2] == [1, 1] and all(1 <= r <= 2 for r in rounds), "dynamic sampling begins in step 3"
    discarded = [line["flops/discarded_total"] > 0 for line in lines[1:]]
    assert discarded == [max(rounds[: i + 1]) > 1 for i in range(5)], "replaced groups are counted"

    result = json.loads((finished / "result.json").read_text())
    for when in ("before", "after"):
        assert set(result[when]) == {"direct", "reasoning"}
        for mode in ("direct", "reasoning"):
            splits = result[when][mode]
            assert set(splits) == {"easy", "medium", "hard"}
            assert splits["easy"]["positions"] >= splits["medium"]["positions"] >= splits["hard"]["positions"]
            assert all(s["low"] <= s["accuracy"] <= s["high"] for s in splits.values())
    assert result["seed"] == 0 and result["wall_seconds"] > 0
    assert result["version"] == rpt_jax.__version__ and result["jax"] == jax.__version__
    assert result["device_kind"] == jax.devices()[0].device_kind
    assert list((finished / "plots").glob("*.png")) and list((finished / "tensorboard").iterdir())

    shape, _, fingerprint = load_policy(finished / "policy")
    assert shape.parameters < 2_000_000 and fingerprint == load_tokenizer(finished / "policy").fingerprint


def test_a_result_of_an_older_format_is_refused(finished: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((workdir / "result.json").read_text())
    del result["format"], result["version"]
    (workdir / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="result.json has format 1"):
        main.run(experiment(**SMALL), workdir)


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("refreshed")
    main.run(experiment(**SMALL | SELF_ENTROPY | {"profile.start": 2, "profile.steps": 1}), workdir)
    return workdir


def test_positions_are_chosen_again_during_training(refreshed: Path) -> None:
    lines = read_metrics(refreshed / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("time/refresh")] == [3, 5]


def test_a_profile_window_writes_a_trace(refreshed: Path, finished: Path) -> None:
    assert list((refreshed / "profile").rglob("*.xplane.pb"))
    assert not (finished / "profile").exists(), "no profile by default"


@pytest.mark.parametrize(("run", "killed_at"), [("finished", 1), ("finished", 4), ("refreshed", 4)])
def test_a_killed_run_resumes_to_the_same_metrics(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, request: pytest.FixtureRequest
) -> None:
    finished, write = request.getfixturevalue(run), MetricsWriter.write
    fields = SMALL | (SELF_ENTROPY if run == "refreshed" else {})

    def write_and_die(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
        write(self, step, scalars)
        if step == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            main.run(experiment(**fields), tmp_path)
    assert not (tmp_path / "result.json").exists()
    main.run(experiment(**fields), tmp_path)

    assert comparable(tmp_path) == comparable(finished)
    mine, theirs = (json.loads((d / "result.json").read_text()) for d in (tmp_path, finished))
    del mine["wall_seconds"], theirs["wall_seconds"]
    assert mine == theirs


def test_a_complete_run_is_left_alone_and_a_changed_config_is_refused(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    before = (finished / "metrics.jsonl").read_bytes()
    main.run(experiment(**SMALL), finished)
    assert "This run is complete" in caplog.text
    with pytest.raises(UserError) as raised:
        main.run(experiment(**SMALL | {"optimizer.learning_rate": 1e-5}), finished)
    assert raised.value.field == "optimizer.learning_rate"
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_resumes_with_another_precision_and_more_steps(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    context = RunContext()
    longer = experiment(**SMALL | {"policy.dtype": "bfloat16", "training.total_steps": 6})
    main.run(longer, tmp_path / "run", context=context)
    # Two steps: each stage feeds the heartbeat that the other processes of a run watch.
    assert context.heartbeat.count >= 2 + 2 * 6 and context.heartbeat.stage == "evaluation"
    said = caplog.text
    assert "policy.dtype: 'float32' there, 'bfloat16' now; training.total_steps: 5 there, 6 now" in said
    assert "Resuming from step 4" in said, "the newest checkpoint; the last step writes a policy instead"
    # Sampler and trainer agree less well than in float32, which shows that the new precision is used.
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[4]["mismatch/max"] < 1e-4 < lines[6]["mismatch/max"] < 1


def test_a_nan_stops_the_run_before_the_update_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With NaN advantages in step 4, the end of step 3 is saved, and the run resumes from there as if nothing had happened."""
    caplog.set_level(logging.INFO, logger="rpt_jax")
    fields = SMALL | {"checkpoint.every_steps": 100}
    to_update_batch = train.to_update_batch
    steps = []

    def spoiled(*arguments: object, **options: object) -> object:
        batch = to_update_batch(*arguments, **options)
        steps.append(0)
        if len(steps) < 4:
            return batch
        return batch._replace(advantages_PxG=jax.jit(lambda x: x * jnp.nan)(batch.advantages_PxG))

    with monkeypatch.context() as patch:
        patch.setattr(train, "to_update_batch", spoiled)
        with pytest.raises(FloatingPointError, match="step 4: .*gradient/norm=nan"):
            main.run(experiment(**fields), tmp_path)
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
        assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["3"]
        record = json.loads((tmp_path / "not_finite.json").read_text())
        assert record["step"] == 4 and record["seed"] == 0 and len(record["ids"]) == 8 == len(record["positions"])
        with pytest.raises(FloatingPointError):
            main.run(experiment(**fields), tmp_path, replay=True)
    main.run(experiment(**fields), tmp_path, replay=True)
    assert "Step 4 was replayed, and all its metrics are finite" in caplog.text
    assert not (tmp_path / "result.json").exists()
    main.run(experiment(**fields), tmp_path)
    assert comparable(tmp_path) == comparable(finished)


def test_a_replay_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not_finite.json does not exist") as raised:
        main.run(experiment(**SMALL), tmp_path, replay=True)
    assert raised.value.field == "--replay"


def test_a_nan_in_a_rollout_metric_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "rollout_metrics", lambda rewarded, usage: {"reward/mean": float("nan")})
    with pytest.raises(FloatingPointError, match="step 1: reward/mean"):
        main.run(experiment(**SMALL | {"checkpoint.every_steps": 1}), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["0"]


PRETRAIN = {
    "data.source_options.documents": 200,
    "data.max_document_tokens": 64,
    "pretrain.documents_per_step": 2,
    "pretrain.rows_per_document": 2,
    "training.total_steps": 3,
    "checkpoint.every_steps": 1,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained")
    main.run(experiment("pretrain_tiny", **PRETRAIN), workdir)
    return workdir


def test_a_nan_stops_pretraining_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    fields = PRETRAIN | {"checkpoint.every_steps": 100}
    pretrain_step = pretrain.pretrain_step
    calls = []

    def spoiled(*arguments: object, **options: object) -> object:
        calls.append(0)
        return pretrain_step(*arguments, **options | ({"weights": (float("nan"), 1.0)} if len(calls) >= 2 else {}))

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "pretrain_step", spoiled)
        with pytest.raises(FloatingPointError, match="step 2: "):
            main.run(experiment("pretrain_tiny", **fields), tmp_path)
        assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["1"]
        record = json.loads((tmp_path / "not_finite.json").read_text())
        assert record["step"] == 2 and len(record["documents"]) == 2
        with pytest.raises(FloatingPointError):
            main.run(experiment("pretrain_tiny", **fields), tmp_path, replay=True)
    main.run(experiment("pretrain_tiny", **fields), tmp_path, replay=True)
    assert "Step 2 was replayed, and all its metrics are finite" in caplog.text
    main.run(experiment("pretrain_tiny", **fields), tmp_path)
    assert comparable(tmp_path) == comparable(pretrained)


def test_pretraining_resumes_and_exports_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Path
) -> None:
    write = MetricsWriter.write

    def write_and_die(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
        write(self, step, scalars)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path)
    main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path)
    assert comparable(tmp_path) == comparable(pretrained)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (tmp_path / "policy" / name).read_bytes() == (pretrained / "policy" / name).read_bytes()


def wait_for(path: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def test_a_cold_start_comes_first_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed during the cold start and right after it, and starts from the policy of the cold start."""
    fields = SMALL | {
        "cold_start.total_steps": 3,
        "pretrain.documents_per_step": 2,
        "pretrain.document_weight": 0.0,
        "pretrain.rows_per_document": 2,
        "training.total_steps": 1,
        "optimizer.learning_rate": 0.0,  # The cold start has its own.
        "checkpoint.every_steps": 1,
    }
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    write = MetricsWriter.write
    seen = []
    main.run(experiment(**fields), whole)

    def write_and_die(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
        write(self, step, scalars)
        seen.append(step if "loss/trace" in scalars else "rpt")
        if len(seen) == 2:
            wait_for(broken / "cold_start" / "checkpoints" / "1")  # Checkpoints are written in the background.
        if len(seen) in (2, 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                main.run(experiment(**fields), broken)
    assert seen == [1, 2, 2, 3, "rpt"] and not (broken / "cold_start" / "checkpoints").exists()
    main.run(experiment(**fields), broken)
    assert comparable(broken) == comparable(whole)
    assert comparable(broken / "cold_start") == comparable(whole / "cold_start")
    assert not any("loss/trace" in line for line in comparable(whole))
    start, cold, end = (
        (path / "model.safetensors").read_bytes()
        for path in (ROOT / "configs" / "tiny", whole / "cold_start" / "policy", whole / "policy")
    )
    assert start != cold == end


def test_the_tokenizer_of_another_policy_is_refused(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in (ROOT / "configs" / "tiny").iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    from rpt_jax.tokenizers.training import train_sentencepiece

    train_sentencepiece(["other words than those of the policy, many enough 123"] * 50, 300, policy / "tokenizer.model")
    with pytest.raises(UserError) as raised:
        main.run(experiment(**SMALL | {"policy.path": str(policy)}), tmp_path / "run")
    assert raised.value.field == "policy.path"


def test_a_batch_that_the_mesh_cannot_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        main.run(
            dataclasses.replace(experiment(**SMALL), mesh=dataclasses.replace(Experiment().mesh, tensor=3)), tmp_path
        )
    assert raised.value.field == "mesh"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ([], "--config is missing"),
        (["--config=configs/none.py"], "configs/none.py"),
        (
            ["--config=configs/rpt_tiny.py", "--config.optimizer.learning_rat=1"],
            "Did you mean 'optimizer.learning_rate'",
        ),
        (
            ["--config=configs/rpt_tiny.py", "--config.data.source_options.documents=many"],
            "data.source_options.documents=many",
        ),
        (["--config=configs/rpt_tiny.py", "--workdr=x"], "Did you mean: workdir"),
        (
            ["--config=configs/rpt_tiny.py", "--config.data.source=path", "--config.data.path=no/such.txt"],
            "no/such.txt",
        ),
        (["--config=configs/rpt_tiny.py", "--config.policy.path=nowhere"], "nowhere"),
        (["--config=configs/rpt_tiny.py", "--config.training.steps=20"], "Did you mean 'training.total_steps'"),
        (
            ["--config=configs/rpt_tiny.py", "--config.data.entropy_top_k=1025"],
            "data.entropy_top_k=1025 must be at most",
        ),
    ),
)
def test_invalid_input_ends_with_one_sentence_and_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = command(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"), ((b"", "gives 0 distinct document"), (b"abc \xff\xfe def\n", "corpus.txt"))
)
def test_a_corpus_without_a_document_ends_with_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "corpus.txt").write_bytes(content)
    path = f"--config.data.path={tmp_path / 'corpus.txt'}"
    done = command(tmp_path, "--config=configs/rpt_tiny.py", "--config.data.source=path", path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stderr.splitlines()[-1], done.stderr


def test_everything_that_is_missing_is_reported_at_once(tmp_path: Path) -> None:
    done = command(tmp_path, "--config=configs/rpt_14b.py")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    mesh, policy, corpus = done.stderr.strip().split("\n")
    assert "mesh.tensor=8 does not fit 1 devices: expected a multiple of 8 devices," in mesh
    assert "models/DeepSeek-R1-Distill-Qwen-14B" in policy and "config.json, model.safetensors, tokenizer" in policy
    assert "data.path='data/omnimath' does not exist" in corpus


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "rpt_jax.main", f"--workdir={tmp_path / 'run'}", *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=600)
