"""The loop of an evaluation: while the devices compute a batch, the host verifies the one before it."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax

from rpt_jax.distributed.processes import to_host
from rpt_jax.evaluation.stored_results import Record, ResultStore
from rpt_jax.infra.console import Progress


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
    """Measures for how much of the time the devices compute.

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
        self._launches: list[tuple[float, concurrent.futures.Future[float]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiter.shutdown(wait=False, cancel_futures=True)

    def launched(self, arrays: Any) -> None:
        """Note that the computation of `arrays` was launched just now."""

        def wait() -> float:
            jax.block_until_ready(arrays)
            return self._clock()

        self._launches.append((self._clock(), self._waiter.submit(wait)))

    def wait(self) -> None:
        """Wait until the devices have computed all launches."""
        concurrent.futures.wait([end for _, end in self._launches])

    def busy_share(self) -> float:
        """Return the share of the time since the first launch, which compiled before, in which the devices computed."""
        self.wait()
        first, _ = self._launches[0]
        busy = 0.0
        free_from = first
        for start, end in self._launches:
            busy += end.result() - max(start, free_from)
            free_from = end.result()
        return busy / max(self._clock() - first, 1e-9)


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

        def finish(batch: int, arrays: Any) -> None:
            store.write(batch, batches.records(batch, to_host(arrays)))
            progress.advance()

        launched: tuple[int, Any] | None = None
        for batch in missing:
            arrays = batches.launch(batch)
            clock.launched(arrays)
            if launched:
                finish(*launched)
            launched = (batch, arrays)
        assert launched, "there was a batch"
        finish(*launched)
        return clock.busy_share()
