"""What a run says about itself: `metrics.jsonl`, TensorBoard, and the console.

The file is the record that plots and comparisons are made from, so it has exactly one line a step whatever happened to
the run; TensorBoard shows the same scalars, and the console shows progress, tables and a few rollouts as text.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import rich
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveProgress
from rich.table import Table
from rich.text import Text

from rpt_jax.distributed.rendezvous import at
from rpt_jax.errors import UserError

FILE_NAME = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10.0
RECENT_STEPS = 50
PROMPT_CHARACTERS = 400
REASONING_CHARACTERS = 800  # At each end.


def _parse(line: bytes) -> dict[str, float] | None:
    """Return the scalars of one line, or None where it is not a JSON object of finite numbers with an integer step."""

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    try:
        scalars = json.loads(line, parse_constant=refuse)
        if not isinstance(scalars, dict) or type(scalars.get("step")) is not int:
            return None
        # Also 1e999 is infinite, and an integer may be more than a float can be.
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
            break  # Nothing follows the last newline, or only what a killed run could not finish.
        if scalars is None:
            raise UserError(
                f"{path}:{number}: not a JSON object of finite numbers with an integer 'step'. "
                "Mend or delete that line, or start again in a new workdir."
            )
        if lines and scalars["step"] <= lines[-1][1]["step"]:
            raise UserError(
                f"{path}:{number}: step {scalars['step']} follows step {lines[-1][1]['step']}, but steps must grow. "
                "Did two runs write to this workdir at once? Start again in a new one."
            )
        lines.append((chunk, scalars))
    return lines


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `metrics.jsonl` in order of `step`, without a last line that was cut short.

    Raises:
      UserError: the file is missing, or a line other than the last is not one that `MetricsWriter` writes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing. Give the workdir of a run that has finished at least one step.")
    return [scalars for _, scalars in _read(path)]


class MetricsWriter:
    """Writes one line of scalars a step to `workdir/metrics.jsonl`, and the same to `workdir/tensorboard`.

    Keys are sorted and floats written in full, so the files of two runs of the same seed can be compared bit for bit,
    but for keys under `time/`, `speed/` and `memory/`: nothing else may depend on the machine's pace.

    Args:
      workdir: directory of the run; made where it is missing. Of several processes of a run, the leader writes there.
      resume_step: last completed step of the run that is continued; -1 for a fresh one. What an earlier run wrote for
        later steps is dropped, so that the file has neither a gap nor a repeat.

    Raises:
      UserError: the file of the earlier run is corrupt before its last line.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        # Late, because the tools that only print need neither.
        from tensorboardX import SummaryWriter

        from rpt_jax.distributed.processes import is_leader

        self._step, self._writes = resume_step, is_leader()
        if not self._writes:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE_NAME
        kept = _truncate(self._path, resume_step) if self._path.exists() else []
        self._file = self._path.open("a", encoding="utf-8", newline="\n")
        # Event files are written late and in blocks: those of a killed run lack steps, or have some of them twice.
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
        for values in kept:
            self._show(values.pop("step"), values)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of `step`; they are in the file when this returns.

        Args:
          step: greater than every step before it.
          scalars: names such as `reward/mean` with numbers, or zero-dimensional arrays.

        Raises:
          FloatingPointError: a scalar is NaN or infinite. The step and the names are given, and nothing is written.
          ValueError: `step` does not grow, or a scalar is called `step`.
        """
        if step <= self._step or "step" in scalars:
            raise ValueError(f"step {step} must follow step {self._step}, and no scalar may be called 'step'")
        values = as_floats(step, scalars)
        self._step = step
        if not self._writes:
            return
        if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            raise OSError(f"{self._path} was replaced while the run wrote to it")
        line = json.dumps({"step": int(step), **values}, sort_keys=True, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        self._show(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._tensorboard.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_floats(step: int, scalars: Mapping[str, Any]) -> dict[str, float]:
    """Return scalars as floats, by name. Raises: FloatingPointError, with the step and the names, where one is not finite."""
    values = {key: float(scalars[key]) for key in sorted(scalars)}
    bad = [f"{key}={value}" for key, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)}")
    return values


def _truncate(path: Path, resume_step: int) -> list[dict[str, float]]:
    """Drop the lines after `resume_step`, and return the others' scalars.

    A run that is killed in the middle of this leaves the old file or the new one.
    """
    kept = [(raw, scalars) for raw, scalars in _read(path) if scalars["step"] <= resume_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(b"".join(raw + b"\n" for raw, _ in kept))
        file.flush()
        os.fsync(file.fileno())  # Without it a power cut after the rename can leave an empty file.
    os.replace(temporary, path)
    return [scalars for _, scalars in kept]


class Progress:
    """Console progress of a loop of known length: a live bar on a terminal, now and then a plain line elsewhere.

    The time that is left is the median of the recent steps' times, times the steps that are left. The first step counts
    for nothing there, because it compiles.

    Args:
      name: what the loop does, in a word or two.
      total: steps of the whole loop, those of an earlier run included.
      done: steps that an earlier run has completed.
      clock: seconds, from any origin.
    """

    def __init__(self, name: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._total, self._done, self._clock = _encodable(name), total, done, clock
        self._console = rich.get_console()
        self._start = self._last_step = self._last_line = clock()
        self._steps, self._status, self._unsaid = 0, "", False
        self._durations: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
        self._live: LiveProgress | None = None
        if self._console.is_interactive:
            self._live = LiveProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}  {task.fields[status]}", markup=False),
                console=self._console,
                refresh_per_second=2,  # The default of 10 takes time from a run that computes on the same cores.
                get_time=clock,
            )
            self._task = self._live.add_task(self._name, total=total, completed=done, eta=_duration(None), status="")
            self._live.start()

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the loop; None before the second step, unless the loop is over."""
        left = self._total - self._done
        if left <= 0:
            return 0.0
        return left * statistics.median(self._durations) if self._durations else None

    def advance(self, status: str = "") -> None:
        """Count one completed step; `status` is a few words to show beside it, such as `reward 0.31`."""
        now = self._clock()
        if self._steps:
            self._durations.append(now - self._last_step)
        self._last_step = now
        self._steps += 1
        self._done += 1
        self._status = _encodable(status)
        self._unsaid = True
        at(f"{self._name} {self._done}/{self._total}")
        if self._live:
            eta = _duration(self.seconds_left)
            self._live.update(self._task, completed=self._done, eta=eta, status=self._status)
        elif self._steps == 1 or self._done == self._total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._say(now)

    def _say(self, now: float) -> None:
        self._last_line, self._unsaid = now, False
        line = (
            f"{self._name} {self._done}/{self._total}  elapsed {_duration(now - self._start)}"
            f"  ETA {_duration(self.seconds_left)}  {self._status}"
        )
        self._console.print(Text(line.rstrip()), soft_wrap=True)

    def close(self) -> None:
        """Leave the console as the last step left it; a loop that was broken off says how far it came."""
        if self._live:
            self._live.stop()
        elif self._unsaid:
            self._say(self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _duration(seconds: float | None) -> str:
    """Write seconds as `m:ss` or `h:mm:ss`, and an unknown time as `-:--`."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; where the console is no terminal it is plain Markdown of full width.

    Args:
      title: printed above the table.
      columns: headings.
      rows: one cell a column. Numbers stand right; integers get thousands separators, floats four significant digits.
    """
    console = rich.get_console()
    terminal = console.is_interactive
    grid = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) for row in rows)
        grid.add_column(Text(_encodable(column)), justify="right" if rows and numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_encodable(_cell(value))) for value in row))
    console.print(Text(_encodable(f"\n{title}"), style="bold"))
    if terminal:
        console.print(grid)
    else:
        Console(file=console.file, width=10_000).print(grid)  # Rich folds cells at 80 columns in a log file.


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _visible(str(value), newlines=False)


@dataclasses.dataclass(frozen=True)
class RolloutText:
    """One rollout to be read by a person. Model text is bytes here, since a response may end inside a character."""

    prompt: bytes
    reasoning: bytes
    prediction: bytes | None  # None: the response holds no prediction.
    truth: bytes
    reward: float
    status: str = ""  # Why the reward is what it is, in a word or two.


def show_rollouts(title: str, rollouts: Sequence[RolloutText]) -> None:
    """Print rollouts one under the other: the prompt's tail, the reasoning, the prediction, the truth and the reward.

    Nothing in the text is obeyed: no terminal sequence, no markup. Prediction and truth are shown as Python literals,
    where a leading space and a newline can be seen, and as a `b'...'` literal where they are not UTF-8.
    """
    console = rich.get_console()
    for number, rollout in enumerate(rollouts, start=1):
        style = "green" if rollout.reward > 0 else "red"
        prediction = "(none)" if rollout.prediction is None else _literal(rollout.prediction)
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text, text_style in (
            ("prompt", _shorten(_prose(rollout.prompt), 0, PROMPT_CHARACTERS), "dim"),
            ("reasoning", _shorten(_prose(rollout.reasoning), REASONING_CHARACTERS, REASONING_CHARACTERS), ""),
            ("prediction", prediction, style),
            ("truth", _literal(rollout.truth), "bold"),
            ("reward", f"{rollout.reward:g}  {_visible(rollout.status, newlines=False)}".rstrip(), style),
        ):
            grid.add_row(Text(label), Text(_encodable(text), style=text_style))
        console.print()
        console.rule(Text(_encodable(f"{title}, rollout {number} of {len(rollouts)}")), align="left")
        console.print(grid)


def _literal(data: bytes) -> str:
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def _prose(data: bytes) -> str:
    return _visible(data.decode("utf-8", "backslashreplace"), newlines=True)


def _visible(text: str, newlines: bool) -> str:
    """Escape every character that prints nothing or moves the cursor; line breaks stay where `newlines` says so."""
    return "".join(
        character
        if character.isprintable() or (newlines and character == "\n")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _shorten(text: str, head: int, tail: int) -> str:
    left_out = len(text) - head - tail
    return text if left_out <= 0 else f"{text[:head]}[... {left_out} characters ...]{text[head + left_out :]}"


def _encodable(text: str) -> str:
    """Escape what the console's encoding lacks: otherwise one accented letter ends a run whose output is ASCII."""
    encoding = rich.get_console().encoding
    return text.encode(encoding, "backslashreplace").decode(encoding)
