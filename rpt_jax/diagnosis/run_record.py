"""What rules read of a run: its config, its metrics, and the rollouts that it kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.diagnosis.finding import Change, Evidence
from rpt_jax.diagnosis.rule import CannotCheck
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.rollout_files import read_table, rollout_files
from rpt_jax.infra.run_format import METRICS
from rpt_jax.infra.workdir import RESULT, RUN_CONFIG, read_run_config

# A mean over fewer steps varies too much: with the 32 prompts × 8 samples of configs/rpt_tiny.py, the mean reward of a step has a
# standard deviation of 0.06, that of ten steps 0.02.
_LEAST_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run on disk.

    Attributes:
      workdir: its directory.
      config: value of each field, as the run wrote it; `training.total_steps` is an integer.
      lines: of metrics.jsonl, in order of "step".
      is_complete: whether the run has a result.
    """

    workdir: Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    is_complete: bool

    @property
    def task(self) -> str:
        """The run's task."""
        return str(self.config.get("task"))

    @property
    def training_lines(self) -> list[Mapping[str, float]]:
        """The lines of training steps."""
        return [line for line in self.lines if line["step"] >= 1]

    @property
    def last_step(self) -> int:
        """The last step in the metrics."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def total_steps(self) -> int:
        """Steps of the run: those that it has if it is complete, else `training.total_steps`."""
        return self.last_step if self.is_complete else max(self.last_step, self.config["training.total_steps"])

    def number(self, field: str) -> float:
        """Return the value of a config field. Raises: CannotCheck, if it is not a number."""
        value = self.config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CannotCheck(f"the run's config has no number {field}")
        return value

    def raised(self, field: str) -> Change:
        """Return the change that raises a config field."""
        return Change(field, "raise", self.config.get(field))

    def lowered(self, field: str) -> Change:
        """Return the change that lowers a config field."""
        return Change(field, "lower", self.config.get(field))

    def set_to(self, field: str, value: Any) -> Change:
        """Return the change that sets a config field to a value."""
        return Change(field, "set", self.config.get(field), value)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a metric, without step 0, and its values."""
        lines = [line for line in self.training_lines if metric in line]
        return [int(line["step"]) for line in lines], [line[metric] for line in lines]

    def window(self, metric: str) -> int:
        """Return how many steps with a metric a mean is taken over: ten, or a tenth of all if that is more."""
        return max(_LEAST_STEPS, len(self.series(metric)[0]) // 10)

    def first(self, metric: str) -> Evidence:
        """Return the mean of a metric over the first `window` steps."""
        steps, values = self.series(metric)
        size = self.window(metric)
        return mean_of(metric, steps[:size], values[:size])

    def last(self, metric: str) -> Evidence:
        """Return the mean of a metric over the last `window` steps."""
        steps, values = self.series(metric)
        size = self.window(metric)
        return mean_of(metric, steps[-size:], values[-size:])

    def rollouts(self, kind: str, columns: Sequence[str], *, last: bool) -> list[dict[str, Any]]:
        """Return the rows of the first or the last kept file of a kind. Raises: CannotCheck, if there is none, or it is damaged.

        Args:
          kind: "training" or "evaluation", of `infra.rollout_files`.
          columns: to read.
          last: whether the last file is wanted.
        """
        files = rollout_files(self.workdir, kind)
        if not files:
            raise CannotCheck(f"no rollouts were kept (rollouts/{kind}_*.parquet)")
        path = files[max(files) if last else min(files)]
        try:
            return read_table(path, list(columns)).to_pylist()
        except (OSError, ValueError, KeyError) as error:
            raise CannotCheck(f"rollouts/{path.name} cannot be read ({error})") from None


def mean_of(metric: str, steps: Sequence[int], values: Sequence[float]) -> Evidence:
    """Return the mean of a metric over some steps, at least one."""
    return Evidence(metric, sum(values) / len(values), steps[0], steps[-1])


def read_run_record(workdir: Path) -> RunRecord:
    """Read a run, also one that is still running.

    Raises: UserError, if the directory is not that of a run of this format, or has no metrics of a training step.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is not the directory of a run.", field="--workdir")
    try:
        config = read_run_config(workdir)
    except FileNotFoundError:
        raise UserError(
            f"--workdir={workdir} has no {RUN_CONFIG}: it is not the directory of a run.", field="--workdir"
        ) from None
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be read ({error}).", field="--workdir") from None
    if not isinstance(config.get("training.total_steps"), int):
        raise UserError(f"{workdir / RUN_CONFIG} has no training.total_steps: it is damaged.", field="--workdir")
    lines = read_metrics(workdir / METRICS)
    if not any(line["step"] >= 1 for line in lines):
        raise UserError(f"{workdir / METRICS} has no training step yet.", field=str(workdir / METRICS))
    return RunRecord(workdir=workdir, config=config, lines=lines, is_complete=_has_result(workdir))


def _has_result(workdir: Path) -> bool:
    try:
        return isinstance(json.loads((workdir / RESULT).read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False
