"""Small runs of the trainer, and what tests read of a run directory."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.infra.metrics import read_metrics

# Changes of configs/rpt_tiny.py that make a run of a few steps take seconds.
SMALL = {
    "data.source_options.documents": 60,
    "data.held_out_documents": 20,
    "data.source_options.held_out_templates": 2,
    "data.positions_per_document": 4,
    "data.max_document_tokens": 128,
    "prompt.max_tokens": 128,
    "rollout.samples_per_prompt": 4,
    "rollout.max_new_tokens": 24,
    "training.prompts_per_step": 8,
    "training.microbatch_tokens": 512,
    "training.total_steps": 5,
    "training.dynamic_sampling_from": 3,
    "training.log_rollouts_every": 2,
    "evaluation.every_steps": 2,
    "evaluation.positions": 16,
    "evaluation.unseen_positions": 8,
    "checkpoint.every_steps": 2,
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
