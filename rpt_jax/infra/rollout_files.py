"""The rollouts of a run on disk: compressed parquet files in `rollouts/`, written by a thread.

Training steps share a file for each logging interval, named after its first step; every evaluation has files of its own.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rpt_jax.distributed.processes import is_leader
from rpt_jax.infra.atomic_write import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"  # Directory in that of the run.
# Kinds of files, with which names begin: rollouts of training steps and of an evaluation, and the text of a full evaluation.
TRAINING = "training"
EVALUATION = "evaluation"
TEXT = "text"
_SUFFIX = ".parquet"
_MAX_PENDING = 32  # Calls that wait for the thread; the next one waits for the first of them.
_ROWS_PER_GROUP = 1 << 14  # Rows that a reader holds at once.


def rollout_file(kind: str, step: int) -> str:
    """Return the name of a file: "training" and the first step in it, or another kind and the step that was evaluated."""
    return f"{kind}_{step:06d}{_SUFFIX}"


def rollout_files(workdir: Path, kind: str) -> dict[int, Path]:
    """Return the files of a kind in a run directory by step, in order."""
    prefix = f"{kind}_"
    paths = (workdir / ROLLOUTS).glob(f"{prefix}*{_SUFFIX}")
    steps = {path.name[len(prefix) : -len(_SUFFIX)]: path for path in paths}
    return dict(sorted((int(step), path) for step, path in steps.items() if step.isdecimal()))


class RolloutFiles:
    """Writes tables of rollouts in the background. A run that resumes leaves the same files as one that was not interrupted.

    Rows stay in memory until their file is complete; `flush` writes the files that are not. If a file cannot be written, as on a
    full disk, that is a warning: the run goes on, and its rows are written with the next ones. Any other error is
    raised by the next call. With several processes, only the leader writes.
    """

    def __init__(self, workdir: Path, step: int, interval: int, *, evaluations: bool):
        """
        Args:
          workdir: directory of the run.
          step: last completed step; rows of later steps are deleted.
          interval: a file of training steps ends at the multiples of this.
          evaluations: whether to keep what `evaluation` is given.
        """
        self._directory = workdir / ROLLOUTS
        self._interval = interval
        self._evaluations = evaluations
        self._is_open = is_leader()
        self._training = ""  # The open file of training steps; "" for none.
        self._tables: dict[str, list[pa.Table]] = collections.defaultdict(
            list
        )  # Of the open files; used by the thread.
        self._changed: set[str] = set()  # Files with rows that are not on disk; used by the thread.
        self._complete: set[str] = set()  # Those of them that get no more rows; used by the thread.
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        if is_leader():
            self._truncate(workdir, step)

    def add_training(self, step: int, make_table: Callable[[], pa.Table]) -> None:
        """Add the rows of a training step. Raises: what an earlier call failed with, unless that was an OSError."""
        self._training = self._training or rollout_file(TRAINING, step)
        self.add(self._training, make_table)
        if step % self._interval == 0:
            self.complete(self._training)
            self._training = ""

    def add(self, name: str, make_table: Callable[[], pa.Table]) -> None:
        """Add rows to the file `name`, which is begun anew unless it is open.

        Args:
          name: from `rollout_file`.
          make_table: returns the rows; called by the thread.

        Raises: what an earlier call failed with, unless that was an OSError.
        """

        def append() -> None:
            self._tables[name].append(make_table())
            self._changed.add(name)

        self._submit(append)

    def complete(self, name: str) -> None:
        """Write the file `name`, to which no more rows are added."""

        def write_and_forget() -> None:
            self._complete.add(name)
            self._write(name)

        self._submit(write_and_forget)

    @contextlib.contextmanager
    def evaluation(self, step: int) -> Iterator[Callable[[str, Callable[[], pa.Table]], None]]:
        """Give a function that adds rows to the files of an evaluation, by kind; the end of the block completes these files."""
        names = set()

        def add(kind: str, make_table: Callable[[], pa.Table]) -> None:
            if self._evaluations:
                name = rollout_file(kind, step)
                names.add(name)
                self.add(name, make_table)

        yield add
        for name in sorted(names):
            self.complete(name)

    def call(self, function: Callable[[], None]) -> None:
        """Call a function in the thread, after everything that was added before, once the open files are written."""
        self._submit(self._write_changed)
        self._submit(function)

    def flush(self) -> None:
        """Write all files and wait until they are on disk. A checkpoint is saved after this, so that the files have its steps.

        Called by any thread.
        """
        if self._is_open:
            self._thread.submit(self._write_changed).result()

    def close(self) -> None:
        """Write all files and end the thread. Raises: as `add` does."""
        self.flush()
        self._is_open = False
        self._thread.shutdown()
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, function: Callable[[], None]) -> None:
        if not self._is_open:
            return
        while self._pending and (self._pending[0].done() or len(self._pending) >= _MAX_PENDING):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(function))

    def _write_changed(self) -> None:
        for name in sorted(self._changed):
            self._write(name)

    def _write(self, name: str) -> None:
        """Write all rows of an open file, and forget them if it is complete. An OSError is logged, and they are kept."""
        import pyarrow as pa  # Takes half a second to import.

        if name in self._changed:
            table = pa.concat_tables(self._tables[name]).combine_chunks()
            self._tables[name] = [table]
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                write_table(self._directory / name, table)
            except OSError as error:
                logger.warning(
                    "%s could not be written (%s); the run goes on.", self._directory / name, error.strerror or error
                )
                return
            self._changed.discard(name)
        if name in self._complete:
            self._complete.discard(name)
            self._tables.pop(name, None)

    def _truncate(self, workdir: Path, step: int) -> None:
        """Delete the rows of steps after `step`, and open the file that the next step belongs to."""
        for kind in (TRAINING, EVALUATION, TEXT):
            for first, path in rollout_files(workdir, kind).items():
                if first > step:
                    path.unlink()
        newest = max(rollout_files(workdir, TRAINING).items(), default=None)
        if newest is None:
            return
        first, path = newest
        try:
            rows = read_table(path, ["step"]).num_rows
            kept = read_table(path, filters=[("step", "<=", step)]).combine_chunks()
        except (OSError, ValueError, KeyError) as error:
            kept_as = path.with_name(f"{path.name}.damaged")
            logger.warning("%s is damaged (%s) and is kept as %s.", path, error, kept_as.name)
            path.replace(kept_as)
            return
        if kept.num_rows < rows:
            self._changed.add(path.name)
        if step % self._interval or kept.num_rows < rows:
            self._tables[path.name] = [kept]
        if step % self._interval:
            self._training = path.name
        elif path.name in self._changed:
            self.complete(path.name)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file atomically. Raises: OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    atomic_write(path, sink.getvalue().to_pybytes())


def read_table(path: Path, columns: list[str] | None = None, filters: list | None = None) -> pa.Table:
    """Read a parquet file. Raises: OSError or ValueError (pyarrow.ArrowInvalid), if it is damaged."""
    import pyarrow.parquet as pq

    # Without partitioning, a folder called a=1 in the path does not become a column.
    return pq.read_table(path, columns=columns, filters=filters, partitioning=None)  # pyright: ignore[reportArgumentType]
