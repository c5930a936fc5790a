"""Console output: the logging handler, progress bars, tables, and rollouts as text."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import rich
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveProgress
from rich.table import Table
from rich.text import Text

from rpt_jax.infra.storage import with_urls

SECONDS_BETWEEN_LINES = 10.0  # Of a progress bar where the output is not a terminal.
RECENT_STEPS = 50  # The remaining time is estimated from this many steps.
PROMPT_CHARACTERS = 400  # Shown of a prompt, from its end.
REASONING_CHARACTERS = 800  # Shown of the reasoning, from each end.

# --- logging ---------------------------------------------------------------------------------------


class ConsoleHandler(logging.Handler):
    """Prints messages below WARNING to stdout as they are, and others to stderr after their level.

    Both are looked up for each message, so that messages appear above a live progress bar, and tests can capture them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        try:
            message = with_urls(self.format(record))
            if record.levelno >= logging.WARNING:
                print(f"{record.levelname.lower()}: {message}", file=sys.stderr, flush=True)
            else:
                rich.get_console().print(Text(_encodable(message)), soft_wrap=True)
        except Exception:  # noqa: BLE001 - the convention of `logging`: a message that cannot be shown does not end the run.
            self.handleError(record)


@contextlib.contextmanager
def console_logging() -> Iterator[None]:
    """Show the package's log messages on the console inside the block, from level INFO."""
    logger = logging.getLogger("rpt_jax")
    level = logger.level
    propagate = logger.propagate
    handler = ConsoleHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextlib.contextmanager
def silent_console() -> Iterator[None]:
    """Show neither log messages nor progress, tables and rollouts inside the block. For all processes but the leader."""
    logger = logging.getLogger("rpt_jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            yield
    finally:
        logger.setLevel(level)


# --- progress --------------------------------------------------------------------------------------


class Progress:
    """Progress of a loop of known length: a live bar on a terminal, a plain line every few seconds elsewhere.

    The remaining time is the median duration of the recent steps times the number of steps left, and the same for each kind of
    interlude. Compilation is not counted, and neither is the first step.

    Args:
      name: what the loop does, in a word or two.
      total: steps of the whole loop, including those of an earlier run.
      done: steps that an earlier run completed.
      transient: for a loop inside another one: leave nothing on a terminal, and print lines elsewhere only if it takes long.
      interludes_left: returns, for a number of completed steps, how many interludes of each kind are still to come.
      alike: for a kind of interlude that has not happened yet, another kind, or a part of the steps, and how many times its
        duration to expect.
      compile_seconds: returns the seconds that programs have been compiled for.
      clock: returns seconds from any origin.

    Attributes:
      total: may change where the length is estimated.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        *,
        transient: bool = False,
        interludes_left: Callable[[int], Mapping[str, int]] = lambda done: {},
        alike: Mapping[str, tuple[str, float]] = MappingProxyType({}),
        compile_seconds: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = _encodable(name)
        self.total = total
        self._done = done
        self._transient = transient
        self._interludes_left = interludes_left
        self._alike = alike
        self._compile_seconds = compile_seconds
        self._clock = clock
        self._console = rich.get_console()
        self._start = self._last_line = clock()
        self._last_step = self._work_clock()
        self._steps = 0
        self._status = ""
        self._has_unprinted_step = False
        self._durations: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
        self._measured: dict[str, list[float]] = {}  # Durations of interludes and parts by kind.
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
                transient=transient,
            )
            self._task = self._live.add_task(self._name, total=total, completed=done, eta=_duration(None), status="")
            self._live.start()

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end of the loop; None before the second step, unless the loop is finished.

        A kind of interlude that has not happened yet, and that is like no other one, is not included.
        """
        left = self.total - self._done
        if left > 0 and not self._durations:
            return None
        steps = left * statistics.median(self._durations) if left > 0 else 0.0
        return steps + sum(count * self._expected(kind) for kind, count in self._interludes_left(self._done).items())

    def _expected(self, kind: str) -> float:
        """Return the seconds to expect of an interlude."""
        if kind in self._measured:
            return statistics.median(self._measured[kind])
        other, times = self._alike.get(kind, ("", 0.0))
        return times * statistics.median(self._measured.get(other, [0.0]))

    def _work_clock(self) -> float:
        """Return seconds without those of compilation: the same program is not compiled again."""
        return self._clock() - self._compile_seconds()

    def _eta(self) -> str:
        """Return the estimate as text; after the last step, with the names of the interludes that are still to come."""
        left = [kind for kind, count in self._interludes_left(self._done).items() if count]
        suffix = f" ({', '.join(left)})" if left and self._done == self.total else ""
        return f"{_duration(self.seconds_left)}{suffix}"

    @contextlib.contextmanager
    def interlude(self, kind: str) -> Iterator[None]:
        """Count the time inside the block as an interlude, such as an evaluation, and not as a part of a step."""
        start = self._work_clock()
        with self.part(kind):
            yield
        self._last_step += self._work_clock() - start

    @contextlib.contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Measure the time inside the block, a part of a step that a kind of interlude is like."""
        start = self._work_clock()
        yield
        self._measured.setdefault(kind, []).append(self._work_clock() - start)

    def advance(self, status: str = "") -> None:
        """Count one completed step.

        Args:
          status: a few words to show next to the count, such as "reward 0.31".
        """
        now = self._clock()
        worked = self._work_clock()
        if self._steps:
            self._durations.append(worked - self._last_step)
        self._last_step = worked
        self._steps += 1
        self._done += 1
        self._status = _encodable(status)
        self._has_unprinted_step = True
        if self._live:
            eta = self._eta()
            self._live.update(self._task, total=self.total, completed=self._done, eta=eta, status=self._status)
            return
        is_first_or_last = self._steps == 1 or self._done == self.total
        if now - self._last_line >= SECONDS_BETWEEN_LINES or (is_first_or_last and not self._transient):
            self._print_line(now)

    def _print_line(self, now: float) -> None:
        self._last_line = now
        self._has_unprinted_step = False
        line = (
            f"{self._name} {self._done}/{self.total}  elapsed {_duration(now - self._start)}"
            f"  ETA {self._eta()}  {self._status}"
        )
        self._console.print(Text(line.rstrip()), soft_wrap=True)

    def close(self) -> None:
        """Stop the bar. If the loop was interrupted, print how far it came."""
        if self._live:
            self._live.stop()
        elif self._has_unprinted_step and not self._transient:
            self._print_line(self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _duration(seconds: float | None) -> str:
    """Format seconds as `m:ss` or `h:mm:ss`, and an unknown time as `-:--`."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# --- tables ----------------------------------------------------------------------------------------


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], max_widths: Sequence[int | None] = ()
) -> None:
    """Print a table. If the output is not a terminal, print Markdown of any width.

    Args:
      title: printed above the table.
      columns: headings.
      rows: one cell per column. Numbers are right-aligned; integers get thousands separators, floats four significant digits.
      max_widths: of the columns, in characters: longer cells are wrapped. Empty or None for no limit.
    """
    console = rich.get_console()
    terminal = console.is_interactive
    grid = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) for row in rows)
        grid.add_column(
            Text(_encodable(column)),
            justify="right" if rows and numeric else "left",
            overflow="fold",
            max_width=max_widths[index] if max_widths else None,
        )
    for row in rows:
        grid.add_row(*(Text(_encodable(_cell(value))) for value in row))
    console.print(Text(_encodable(f"\n{title}"), style="bold"))
    if terminal:
        console.print(grid)
    else:
        Console(file=console.file, width=10_000).print(grid)  # Rich wraps cells at 80 columns in a log file.


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _printable(str(value), keep_newlines=False)


# --- rollouts --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RolloutText:
    """One rollout to show. The model's text is bytes, because a response may end inside a character.

    Attributes:
      prompt: text of the prompt.
      reasoning: the response up to the end of thinking.
      prediction: the response after the end of thinking; None if thinking did not end.
      truth: the true next token.
      reward: the reward of the rollout.
      status: the reason for the reward, in a word or two.
    """

    prompt: bytes
    reasoning: bytes
    prediction: bytes | None
    truth: bytes
    reward: float
    status: str = ""


def show_rollouts(title: str, rollouts: Sequence[RolloutText]) -> None:
    """Print the end of the prompt, the reasoning, the prediction, the truth and the reward of each rollout.

    Control characters and markup in the text are escaped. Prediction and truth are shown as Python literals, so that leading
    spaces and newlines are visible; text that is not UTF-8 is shown as a `b'...'` literal.
    """
    console = rich.get_console()
    for number, rollout in enumerate(rollouts, start=1):
        style = "green" if rollout.reward > 0 else "red"
        prediction = "(none)" if rollout.prediction is None else _literal(rollout.prediction)
        reward = f"{rollout.reward:g}  {_printable(rollout.status, keep_newlines=False)}".rstrip()
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text, text_style in (
            ("prompt", _shorten(_decode(rollout.prompt), 0, PROMPT_CHARACTERS), "dim"),
            ("reasoning", _shorten(_decode(rollout.reasoning), REASONING_CHARACTERS, REASONING_CHARACTERS), ""),
            ("prediction", prediction, style),
            ("truth", _literal(rollout.truth), "bold"),
            ("reward", reward, style),
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


def _decode(data: bytes) -> str:
    return _printable(data.decode("utf-8", "backslashreplace"), keep_newlines=True)


def _printable(text: str, keep_newlines: bool) -> str:
    """Escape every character that is invisible or moves the cursor."""
    return "".join(
        character
        if character.isprintable() or (keep_newlines and character == "\n")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _shorten(text: str, head: int, tail: int) -> str:
    omitted = len(text) - head - tail
    return text if omitted <= 0 else f"{text[:head]}[... {omitted} characters ...]{text[head + omitted :]}"


def _encodable(text: str) -> str:
    """Escape characters that the console's encoding lacks. Otherwise one accented letter would end a run on an ASCII console."""
    encoding = rich.get_console().encoding
    return text.encode(encoding, "backslashreplace").decode(encoding)
