"""Small runs of the trainer, and what tests read of a run directory."""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from rpt_jax import main
from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.infra.metrics import MetricsWriter, read_metrics
from tests.helpers.run_pages import training_files

# Changes of configs/rpt_tiny.py that make a run of a few steps take seconds.
SMALL = {
    "data.source_options.documents": 60,
    "data.held_out_documents": 20,
    "data.source_options.held_out_templates": 2,
    "data.positions_per_window": 4,
    "data.max_document_tokens": 128,
    "prompt.max_tokens": 128,
    "rollout.samples_per_prompt": 4,
    "rollout.max_new_tokens": 24,
    "rollout.decode_slots": 8,  # A decode loop for one size of the live batch is compiled, not for many.
    "training.prompts_per_step": 8,
    "training.microbatch_tokens": 512,
    "training.total_steps": 5,
    "training.dynamic_sampling_from": 3,
    "training.log_rollouts_every": 2,
    "evaluation.every_steps": 2,
    "evaluation.positions": 16,
    # As in training: one program less to compile.
    "evaluation.prompts_per_batch": 0,
    "evaluation.samples": 0,
    "evaluation.unseen_positions": 8,
    "checkpoint.every_steps": 2,
}
# Changes that score the windows again during training.
SELF_ENTROPY = {"data.positions": "self_entropy", "data.rescore_every_steps": 2, "data.rescore_windows": 32}
# A cold start of three steps, then one step that changes nothing.
COLD_START = SMALL | {
    "cold_start.total_steps": 3,
    "pretrain.windows_per_step": 2,
    "pretrain.document_weight": 0.0,
    "pretrain.rows_per_window": 2,
    "training.total_steps": 1,
    "optimizer.learning_rate": 0.0,  # The cold start has its own.
    "checkpoint.every_steps": 1,
}
SHORT = SMALL | {"training.total_steps": 3, "training.dynamic_sampling_from": 9, "evaluation.positions": 8}
# Everything that depends on more than the parameters: moving average, starting policy, documents, step.
EVERYTHING = SHORT | {
    "objective.reward": "info_gain",
    "objective.reference_tokens": 2,
    "objective.baseline_decay": 0.5,
    "objective.budget_weight": 0.25,
    "objective.budget_start": 16,
    "objective.budget_decay": 0.5,
    "objective.format_weight": 0.5,
    "objective.overlong_weight": 0.5,
    "objective.overlong_tokens": 8,
    "objective.advantage": "opo",
    "objective.loss": "cispo",
    "objective.aggregation": "sequence_mean",
    "objective.importance": "mask",
    "objective.kl": "k2",
    "objective.kl_weight": 0.1,
    "objective.entropy_weight": 0.01,
    "objective.document_weight": 0.5,
    "training.minibatches_per_step": 2,
    "optimizer.warmup_steps": 0,  # These runs are short: every step has the full learning rate.
    "checkpoint.every_steps": 1,
}
# Changes of configs/rpt_tiny.py with which a run writes every metric: a cold start, all optional terms of the objective, dynamic
# sampling and a rescoring.
EVERY_METRIC = {
    "data.source_options.documents": 40,
    "data.held_out_documents": 20,
    "data.source_options.held_out_templates": 2,
    "data.max_document_tokens": 96,
    "data.positions": "self_entropy",
    "data.rescore_every_steps": 2,
    "data.rescore_windows": 32,
    "prompt.max_tokens": 96,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 12,
    "rollout.decode_slots": 8,
    "rollout.stop_at_box": True,
    "objective.importance": "mask",
    "objective.kl": "k2",
    "objective.kl_weight": 0.1,
    "objective.entropy_weight": 0.01,
    "objective.document_weight": 0.5,
    "training.prompts_per_step": 4,
    "training.microbatch_tokens": 128,
    "training.total_steps": 4,
    "training.dynamic_sampling_from": 3,
    "evaluation.every_steps": 2,
    "evaluation.positions": 16,
    # As in training: one program less to compile.
    "evaluation.prompts_per_batch": 0,
    "evaluation.samples": 0,
    "evaluation.unseen_positions": 4,
    "checkpoint.every_steps": 1,
    "cold_start.total_steps": 1,
    "optimizer.learning_rate": 0.0,  # The cold start has its own, so it alone changes the policy.
    "pretrain.windows_per_step": 2,
    "pretrain.rows_per_window": 2,
}
# Changes of configs/pretrain_tiny.py, likewise.
PRETRAIN = {
    "data.source_options.documents": 200,
    "data.max_document_tokens": 64,
    "pretrain.windows_per_step": 2,
    "pretrain.rows_per_window": 2,
    "data.held_out_documents": 20,
    "training.total_steps": 3,
    "optimizer.schedule": "constant",
    "checkpoint.every_steps": 1,
}


def experiment(name: str = "rpt_tiny", **overrides: object) -> Experiment:
    """Return the experiment of `configs/<name>.py` with some fields changed ("optimizer.learning_rate": 1e-5)."""
    config = importlib.import_module(f"configs.{name}").get_config()
    return from_config_dict(config.to_dict(), [f"{field}={value}" for field, value in overrides.items()])


def comparable(workdir: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without the scalars that may differ between two runs with the same seed."""
    machine_dependent = ("time/", "speed/", "memory/")
    return [
        {name: value for name, value in line.items() if not name.startswith(machine_dependent)}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


def tensorboard_events(workdir: Path) -> Iterator[Event]:
    """Yield the events in `workdir/tensorboard`, in the order of the files."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


@contextlib.contextmanager
def interruption_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Expect that the run inside is interrupted, as by Ctrl-C, right after it has written the metrics of `step`."""
    write = MetricsWriter.write

    def write_and_interrupt(self: MetricsWriter, written: int, scalars: dict[str, float]) -> None:
        write(self, written, scalars)
        if written == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


def assert_resumes(
    fields: dict[str, object], step: int, uninterrupted: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that a run that is interrupted after `step` resumes to the metrics and the result of the uninterrupted one."""
    with interruption_after(step, monkeypatch):
        main.run(experiment(**fields), workdir)
    assert not (workdir / "result.json").exists()
    main.run(experiment(**fields), workdir)

    assert comparable(workdir) == comparable(uninterrupted)
    assert training_files(workdir) == training_files(uninterrupted)
    mine, theirs = (json.loads((d / "result.json").read_text()) for d in (workdir, uninterrupted))
    for result in (mine, theirs):
        del result["wall_seconds"], result["seconds"]
    assert mine == theirs


def assert_goes_on(name: str, fields: dict[str, object], steps: int, whole: Path, workdir: Path) -> None:
    """Assert that a finished run of `steps` steps, called again with those of `fields`, becomes the run in `whole`."""
    main.run(experiment(name, **fields | {"training.total_steps": steps}), workdir)
    main.run(experiment(name, **fields), workdir)
    assert comparable(workdir) == comparable(whole)
    for path in sorted((whole / "policy").iterdir()):
        assert (workdir / "policy" / path.name).read_bytes() == path.read_bytes(), path.name
