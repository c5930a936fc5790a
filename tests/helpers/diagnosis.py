"""Directories of runs as the doctor reads them: healthy ones, with the metrics of real runs, and ways to make them sick."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.infra.rollout_files import EVALUATION, RolloutFiles
from rpt_jax.infra.run_format import format_stamp
from rpt_jax.kept_rollouts import rollout_schema

# A metric's value as a function of the fraction of the run that is done, or the same value in every step.
Curve = float | Callable[[float], float]


def line(start: float, end: float) -> Curve:
    """Return a curve that goes straight from one value to another."""
    return lambda done: start + (end - start) * done


# From the steps 2 to 101 of a run of configs/rpt_tiny.py.
RPT: Mapping[str, Curve] = {
    "data/cut": 0.0,
    "data/passes": line(0.018, 1.9),
    "distinct/1": line(0.163, 0.108),
    "distinct/2": line(0.268, 0.169),
    "distinct/3": line(0.362, 0.215),
    "ended/box": 0.0,
    "ended/length": 0.002,
    "ended/stop": 0.998,
    "flops/train_total": line(3.2e11, 9.1e12),
    "format/rate": 0.999,
    "gradient/norm": line(0.71, 0.27),
    "groups/drawn_zero_variance": line(0.34, 0.65),
    "groups/rounds": 1.0,
    "groups/zero_variance": line(0.34, 0.65),
    "length/max": 61.0,
    "length/mean": line(10, 21),
    "length/p90": line(7, 42),
    "loss/policy": line(-0.07, -0.003),
    "mismatch/max": 2.9e-05,
    "mismatch/mean": 2.3e-07,
    "mismatch/p99": 6e-06,
    "parameters/norm": 112.3,
    "policy/entropy": line(0.186, 0.059),
    "ratio/mean": 1.0,
    "reward/drawn_mean": line(0.33, 0.53),
    "reward/mean": line(0.33, 0.53),
    "rollout/occupancy": 0.88,
    "status/correct": line(0.33, 0.53),
    "status/empty": 0.0,
    "status/no_box": 0.001,
    "status/not_finished": 0.002,
    "time/checkpoint": 0.0005,
    "time/compile": 0.0,
    "time/compiled_programs": 0.0,
    "time/data": 0.08,
    "time/reshard": 1.5e-5,
    "time/reward": 0.013,
    "time/rollout": 3.9,
    "time/step": 7.1,
    "time/update": 3.0,
    "update/learning_rate": line(5e-5, 3e-5),
    "update/norm": line(0.036, 0.04),
    "update/skipped": 0.0,
    "update/tokens": line(1933, 1440),
}
RFT: Mapping[str, Curve] = RPT | {
    "status/unverified": 0.0,
    "status/wrong": line(0.67, 0.47),
    "time/verification": 0.002,
}
# Of the first 12 steps of configs/pretrain_tiny.py, with 4 windows in each.
PRETRAIN: Mapping[str, Curve] = {
    "data/passes": line(0.006, 0.07),
    "flops/train_total": line(1.5e10, 1.6e11),
    "gradient/norm": line(7.2, 5.4),
    "loss/document": line(7.4, 6.9),
    "loss/trace": line(7.4, 6.2),
    "parameters/norm": 85.4,
    "time/step": 10.0,
    "update/learning_rate": line(3e-5, 3.6e-4),
    "update/norm": line(0.029, 0.16),
    "update/skipped": 0.0,
}
METRICS = {"rpt": RPT, "rft": RFT, "pretrain": PRETRAIN}
GAINED = {"easy": (0.32, 0.44), "medium": (0.24, 0.38), "hard": (0.18, 0.32)}


def write_run(
    workdir: Path,
    task: str = "rpt",
    *,
    steps: int = 60,
    metrics: Mapping[str, Curve] | None = None,
    config: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    evaluated: Mapping[str, tuple[float, float]] | None = None,
    width: float = 0.05,
    finished: bool = True,
) -> Path:
    """Write the directory of a run without rollouts, and return it.

    Args:
      workdir: the directory.
      task: its task.
      steps: of the run.
      metrics: curves in place of those of a healthy run.
      config: fields in place of their defaults.
      without: metrics that are left out.
      evaluated: for each level, or "questions", the accuracy before and after training; that of a healthy run by default.
      width: of half of their intervals.
      finished: whether the run has a result.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    curves = {name: curve for name, curve in (METRICS[task] | (metrics or {})).items() if name not in without}
    lines = []
    for step in range(1, steps + 1):
        values = {name: curve(step / steps) if callable(curve) else curve for name, curve in curves.items()}
        lines.append({"step": step, **values})
    if task != "pretrain":
        lines.insert(0, {"step": 0, "time/setup": 30.0, "time/compile": 20.0, "time/compiled_programs": 60.0})
        lines[1] |= {"time/compile": 40.0, "time/compiled_programs": 11.0}
        default = {"questions": (0.2, 0.6)} if task == "rft" else GAINED
        for name, (before, after) in (evaluated or default).items():
            metric = "eval/questions/accuracy" if name == "questions" else f"eval/reasoning/{name}"
            for values, accuracy in ((lines[0], before), (lines[-1], after)):
                values |= {metric: accuracy, f"{metric}/low": accuracy - width, f"{metric}/high": accuracy + width}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    fields = dict(leaves(Experiment())) | {"task": task, "training.total_steps": steps} | (config or {})
    (workdir / "run_config.json").write_text(json.dumps({**format_stamp(), "command": "rpt", "config": fields}))
    if finished:
        (workdir / "result.json").write_text(json.dumps({**format_stamp(), "steps": steps}))
    return workdir


def write_training_rollouts(workdir: Path, steps: int, reasoning: Callable[[int, int], str]) -> None:
    """Write the kept rollouts of training steps, four prompts of two samples in each and a file for ten steps.

    Args:
      workdir: directory of the run.
      steps: of the run.
      reasoning: returns that of the responses to a prompt, from the step and the number of the prompt.
    """
    with RolloutFiles(workdir, -1, 10, evaluations=True) as files:
        for step in range(1, steps + 1):
            rows = [
                _rollout(step=step, split="train", prompt=p, sample=g, reasoning=reasoning(step, p))
                for p in range(4)
                for g in range(2)
            ]
            files.add_training(step, lambda rows=rows: pa.Table.from_pylist(rows, schema=rollout_schema()))


def write_evaluation_rollouts(workdir: Path, step: int, right_D: np.ndarray, *, split: str = "held_out") -> None:
    """Write the kept rollouts of an evaluation, a position with entropy 1.2 and one sample in each document.

    Args:
      workdir: directory of the run.
      step: that was evaluated.
      right_D: 1 where the sample is right.
      split: of the positions.
    """
    rows = [
        _rollout(step=step, split=split, source=str(d), window=d, position=9, entropy=1.2, reward=float(right))
        for d, right in enumerate(right_D)
    ]
    with RolloutFiles(workdir, 10**6, 10, evaluations=True) as files, files.evaluation(step) as keep:
        keep(EVALUATION, lambda: pa.Table.from_pylist(rows, schema=rollout_schema()))


def _rollout(**values: Any) -> dict[str, Any]:
    same = {
        "source": "0",
        "context": "12 pears",
        "truth": " 3",
        "status": "correct",
        "reasoning": "",
        "length": 9,
        "logprob": -3.0,
    }
    return same | {"prompt": 0, "sample": 0, "window": 0, "position": 0, "entropy": 1.0, "reward": 1.0} | values
