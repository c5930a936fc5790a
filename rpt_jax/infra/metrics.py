"""The metrics of a run: `metrics.jsonl`, TensorBoard and the trackers of `infra.trackers`.

`metrics.jsonl` is the record for plots and comparisons: exactly one line per step, also if the run was interrupted and resumed.
TensorBoard and trackers show the same scalars.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rpt_jax.distributed.processes import is_leader
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.run_format import METRICS
from rpt_jax.infra.trackers import Trackers

if TYPE_CHECKING:
    import pyarrow as pa


def _parse(line: bytes) -> dict[str, float] | None:
    """Return the scalars of one line, or None if it is not a JSON object of finite numbers with an integer step."""

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    try:
        scalars = json.loads(line, parse_constant=refuse)
        if not isinstance(scalars, dict) or type(scalars.get("step")) is not int:
            return None
        # 1e999 parses as infinity, and an integer may be too large for a float.
        finite = all(type(value) in (int, float) and math.isfinite(value) for value in scalars.values())
    except (OverflowError, RecursionError, ValueError):
        return None
    return scalars if finite else None


def _read(path: Path) -> list[tuple[bytes, dict[str, float]]]:
    """Return every complete line of `path`, raw and parsed."""
    lines: list[tuple[bytes, dict[str, float]]] = []
    chunks = path.read_bytes().split(b"\n")
    for number, chunk in enumerate(chunks, start=1):
        scalars = _parse(chunk)
        if scalars is None and number == len(chunks):
            break  # After the last newline there is nothing, or a line that a killed run did not finish.
        if scalars is None:
            raise UserError(
                f"{path}:{number}: not a JSON object of finite numbers with an integer 'step'. "
                "Fix or delete that line, or start a new run in another workdir.",
                field=str(path),
            )
        if lines and scalars["step"] <= lines[-1][1]["step"]:
            raise UserError(
                f"{path}:{number}: step {scalars['step']} follows step {lines[-1][1]['step']}, but steps must increase. Two runs "
                "may have written to this workdir at once; start a new run in another one.",
                field=str(path),
            )
        lines.append((chunk, scalars))
    return lines


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `metrics.jsonl` in order of `step`, without an incomplete last line.

    Raises:
      UserError: the file is missing, or a line other than the last one is invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} is missing; expected the workdir of a run that has completed at least one step.", field=str(path)
        )
    return [scalars for _, scalars in _read(path)]


class MetricsWriter:
    """Writes one line of scalars per step to `workdir/metrics.jsonl`, and the same scalars to `workdir/tensorboard`.

    Keys are sorted and floats are written in full, so the files of two runs with the same seed are equal bit for bit, except for
    keys under `time/`, `speed/` and `memory/`, which depend on the machine. With several processes, only the leader writes.

    Args:
      workdir: directory of the run; created if it is missing.
      resume_step: last completed step of the run that is resumed; -1 for a new run. Lines of later steps are dropped, so that
        the file has neither gaps nor repeated steps.
      trackers: get the same scalars; closed with the files.

    Raises:
      UserError: the file of the earlier run is corrupt before its last line.
    """

    def __init__(self, workdir: Path, resume_step: int, trackers: Trackers | None = None) -> None:
        # Imported late, because tools that only read metrics do not need it.
        from tensorboardX import SummaryWriter

        self._step = resume_step
        self._trackers = trackers
        self._is_writer = is_leader()
        if not self._is_writer:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / METRICS
        # The trackers have got the steps after `resume_step` too: a run writes them again, to the same numbers.
        kept, self._tracked_step = _truncate(self._path, resume_step) if self._path.exists() else ([], -1)
        self._file = self._path.open("a", encoding="utf-8", newline="\n")
        # TensorBoard buffers events, so the files of a killed run lack steps or repeat them: write them again.
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
        for values in kept:
            self._show(int(values.pop("step")), values)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of `step` to the file, and flush it.

        Args:
          step: greater than all earlier steps.
          scalars: numbers or zero-dimensional arrays, by name ("reward/mean").

        Raises:
          FloatingPointError: a scalar is NaN or infinite; the message names it and the step. Nothing is written.
          OSError: the file was replaced, or cannot be written.
          ValueError: `step` does not increase, or a scalar is called "step".
        """
        if step <= self._step or "step" in scalars:
            raise ValueError(f"step {step} must follow step {self._step}, and no scalar may be called 'step'")
        values = as_floats(step, scalars)
        self._step = step
        if not self._is_writer:
            return
        if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            raise OSError(f"{self._path} was replaced while the run was writing to it")
        line = json.dumps({"step": int(step), **values}, sort_keys=True, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        self._show(step, values)

    def show_table(self, key: str, step: int, make_table: Callable[[], pa.Table]) -> None:
        """Log a table of rollouts to the trackers, if there are any.

        Args:
          key: name of the table.
          step: that the rollouts are of.
          make_table: returns a row for each rollout.
        """
        if self._trackers and self._trackers.are_running and step > self._tracked_step:
            self._trackers.log_table(key, step, make_table())

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step to TensorBoard and to the trackers."""
        for key, value in values.items():
            self._tensorboard.add_scalar(key, value, step)
        if self._trackers:
            self._trackers.log(step, values, logged=step <= self._tracked_step)

    def close(self) -> None:
        """Close the files."""
        if self._is_writer:
            self._file.close()
            self._tensorboard.close()
            if self._trackers:
                self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_floats(step: int, scalars: Mapping[str, Any]) -> dict[str, float]:
    """Return scalars as floats, sorted by name.

    Raises:
      FloatingPointError: some are NaN or infinite; the message names them and the step.
    """
    values = {key: float(scalars[key]) for key in sorted(scalars)}
    bad = [f"{key}={value}" for key, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)}")
    return values


def _truncate(path: Path, resume_step: int) -> tuple[list[dict[str, float]], int]:
    """Drop the lines after `resume_step`; return the scalars of the others, and the last step before (-1 for none)."""
    lines = _read(path)
    kept = [(raw, scalars) for raw, scalars in lines if scalars["step"] <= resume_step]
    atomic_write(path, b"".join(raw + b"\n" for raw, _ in kept))
    return [scalars for _, scalars in kept], int(lines[-1][1]["step"]) if lines else -1
