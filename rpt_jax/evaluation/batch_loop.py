"""The loop of an evaluation: while the devices compute a batch, the host verifies the one before it."""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax

from rpt_jax.distributed.processes import to_host
from rpt_jax.evaluation.stored_results import Record, ResultStore
from rpt_jax.infra.accounting import CompileTimes
from rpt_jax.infra.console import Progress
from rpt_jax.infra.overlap import start_one_ahead


class Batches(Protocol):
    """What is evaluated, in batches that are independent of each other."""

    @property
    def count(self) -> int:
        """Number of batches."""
        ...

    def launch(self, batch: int) -> Any:
        """Start the computation of a batch on the devices, and return its arrays without waiting for them."""
        ...

    def records(self, batch: int, arrays: Any) -> list[Record]:
        """Return the results of a batch, given its arrays on the host."""
        ...


class DeviceClock:
    """Measures for how much of the time the devices compute; the time in which programs are compiled is left out.

    A thread waits for the results of each launch. The devices run one launch after the other, so each keeps them busy from its
    start, or from the end of the launch before, until its own end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """
        Args:
          clock: returns seconds from any origin.
        """
        self._clock = clock
        self._waiter = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._compile_times = CompileTimes()
        self._compiling: list[tuple[float, float]] = []  # When launches that compiled began and returned.
        self._launches: list[
            tuple[float, concurrent.futures.Future[float]]
        ] = []  # When each returned, and when it ended.

    def __enter__(self) -> Self:
        self._compile_times.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._compile_times.stop()
        self._waiter.shutdown(wait=False, cancel_futures=True)

    def launch(self, start: Callable[[], Any]) -> Any:
        """Call `start`, which launches a computation, and return its arrays.

        Args:
          start: returns arrays without waiting for them.
        """
        began = self._clock()
        arrays = start()
        launched = self._clock()
        if self._compile_times.take()["time/compiled_programs"]:
            self._compiling.append((began, launched))

        def wait() -> float:
            jax.block_until_ready(arrays)
            return self._clock()

        self._launches.append((launched, self._waiter.submit(wait)))
        return arrays

    def wait(self) -> None:
        """Wait until the devices have computed all launches."""
        concurrent.futures.wait([end for _, end in self._launches])

    def busy_share(self) -> float:
        """Return the share of the time since the first launch in which the devices computed."""
        self.wait()
        first, _ = self._launches[0]
        busy = 0.0
        free_from = first
        for launched, end in self._launches:
            busy += self._without_compiling(max(launched, free_from), end.result())
            free_from = end.result()
        return busy / max(self._without_compiling(first, self._clock()), 1e-9)

    def _without_compiling(self, start: float, end: float) -> float:
        """Return the seconds from `start` to `end` in which no program was compiled."""
        compiling = sum(max(0.0, min(end, b) - max(start, a)) for a, b in self._compiling)
        return max(0.0, end - start) - compiling


def run_batches(name: str, batches: Batches, store: ResultStore) -> float | None:
    """Evaluate the batches that are not stored yet, and store them.

    Each batch is launched before the one in front of it is verified, so that the devices always have work.

    Args:
      name: for the progress bar.
      batches: what is evaluated.
      store: keeps the results.

    Returns: the share of the time in which the devices computed; None if all batches were stored already.
    """
    missing = [batch for batch in range(batches.count) if not store.has(batch)]
    if not missing:
        return None
    with Progress(name, batches.count, batches.count - len(missing)) as progress, DeviceClock() as clock:

        def launch(batch: int) -> tuple[int, Any]:
            return batch, clock.launch(functools.partial(batches.launch, batch))

        def finish(launched: tuple[int, Any]) -> None:
            batch, arrays = launched
            store.write(batch, batches.records(batch, to_host(arrays)))

        for _ in start_one_ahead(missing, launch, finish):
            progress.advance()
        return clock.busy_share()
