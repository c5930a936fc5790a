"""The loop of an evaluation: while the devices compute a batch, the host verifies the one before it."""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, Self

import jax

from rpt_jax.distributed.processes import to_host
from rpt_jax.evaluation.stored_results import Record, ResultStore
from rpt_jax.infra.accounting import CompileTimes
from rpt_jax.infra.console import Progress
from rpt_jax.infra.overlap import finish_one_behind


class Batches(Protocol):
    """What is evaluated, in batches that are independent of each other."""

    @property
    def count(self) -> int:
        """Number of batches."""
        ...

    def launch(self, batch: int) -> Any:
        """Start the computation of a batch on the devices, and return its arrays without waiting for them."""
        ...

    def verify(self, batch: int, arrays: Any) -> Callable[[], list[Record]]:
        """Start to verify a batch, given its arrays on the host; return a function that waits for its results."""
        ...


class DeviceClock:
    """Measures for how much of the time the devices compute; the time in which programs are compiled is left out.

    A thread waits for the results of each launch. The devices run one launch after the other, so each keeps them busy from its
    call, or from the end of the launch before, until its own end. Some devices return from the call only at that end.
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
        ] = []  # When each was called, and when it ended.

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

        self._launches.append((began, self._waiter.submit(wait)))
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
        for began, end in self._launches:
            busy += self._without_compiling(max(began, free_from), end.result())
            free_from = end.result()
        return busy / max(self._without_compiling(first, self._clock()), 1e-9)

    def _without_compiling(self, start: float, end: float) -> float:
        """Return the seconds from `start` to `end` in which no program was compiled."""
        compiling = sum(max(0.0, min(end, b) - max(start, a)) for a, b in self._compiling)
        return max(0.0, end - start) - compiling


def evaluate_batches(
    batches: Batches, numbers: Iterable[int], clock: DeviceClock | None = None
) -> Iterator[tuple[int, list[Record]]]:
    """Yield the number and the results of each batch. A collective: every process must call it.

    A batch is launched before the verification of the one in front of it starts, and that of the one before is waited for after
    this, so that neither the devices nor the verifiers run out of work.

    Args:
      batches: what is evaluated.
      numbers: of the batches to evaluate.
      clock: measures how busy the devices are; None if nobody asks.
    """

    def launch(batch: int) -> tuple[int, Any]:
        start = functools.partial(batches.launch, batch)
        return batch, clock.launch(start) if clock else start()

    def verify(launched: tuple[int, Any]) -> tuple[int, Callable[[], list[Record]]]:
        batch, arrays = launched
        return batch, batches.verify(batch, to_host(arrays))

    verifying = finish_one_behind(map(launch, numbers), verify)
    return finish_one_behind(verifying, lambda started: (started[0], started[1]()))


def run_batches(name: str, batches: Batches, store: ResultStore) -> float | None:
    """Evaluate the batches that are not stored yet, and store them.

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
        for batch, records in evaluate_batches(batches, missing, clock):
            store.write(batch, records)
            progress.advance()
        return clock.busy_share()
