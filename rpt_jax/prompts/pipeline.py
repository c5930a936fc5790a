"""grain pipelines: an order that is a function of (seed, index), and iterators whose state is one small JSON object."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.infra.signals import end_with_parent
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position, PositionIndex

# grain would by default build 500 batches ahead: memory, and time on cores that are busy.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_LONGEST = 2**32 - 1  # Elements that grain's shuffle takes.


class PromptStream:
    """Batches of prompts, `PromptBatch`es of the positions of an order, without end.

    Its state is the numbers of the next batch and of the order's first. So the stream after a restore is the same stream, with
    another number of processes or workers too. A prompt's id is its number in the stream: its noise outlives restarts.

    Args:
      documents: token ids of those that positions are of.
      batch: prompts of a step, of all processes together.
      workers: processes that build batches ahead; 0 = a thread of this one.
      process: (number, count): which equal part of every batch is built.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        documents: Sequence[Sequence[int]],
        order: grain.MapDataset,
        *,
        batch: int,
        workers: int = 0,
        process: tuple[int, int] = (0, 1),
    ):
        self._builder, self._documents, self._batch, self._workers = builder, documents, batch, workers
        number, count = process
        if batch % count:
            raise ValueError(f"a batch of {batch} for {count} processes")
        self._mine = slice(number * batch // count, (number + 1) * batch // count)
        self._next = 0
        self.renew(order)

    def renew(self, order: grain.MapDataset) -> None:
        """Go on with the next batch, but from the beginning of another order."""
        self._order, self._first = order, self._next
        self._start()

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> PromptBatch:
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"batch": self._next, "first": self._first}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on where another stream was, which had the same order."""
        self._next, self._first = state["batch"], state["first"]
        self._start()

    def _start(self) -> None:
        builder, documents, mine, before = self._builder, self._documents, self._mine, self._first * self._batch

        # Without self: its iterator cannot be sent to other processes.
        def build(numbered: Sequence[tuple[int, Position]]) -> PromptBatch:
            return stack([builder.build(i, documents[p.document], p) for i, p in numbered[mine]])

        def pair(index: int, position: Position) -> tuple[int, Position]:
            return before + index, position

        batches = self._order.map_with_index(pair).batch(self._batch, drop_remainder=True, batch_fn=list).map(build)
        rest = batches[self._next - self._first :].to_iter_dataset(_READING)
        if self._workers:
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            rest = rest.mp_prefetch(options, worker_init_fn=lambda *_: end_with_parent())
        self._iterator = iter(rest)


def position_order(
    stages: Sequence[Sequence[Position]],
    weights: Sequence[float],
    *,
    stage_prompts: int,
    batch: int,
    per_document: int,
    seed: int,
) -> grain.MapDataset:
    """Positions without end: in every epoch all of them, in a new order, a function of (seed, index).

    Args:
      stages: positions of each stage of a curriculum, and within a stage of each part of a mixture; without either, a single
        one.
      weights: of the parts; [] = one part.
      stage_prompts: prompts of each stage but the last.
      batch, per_document: see `DocumentOrder`; 0 = no limit, and all positions are shuffled alike.
    """
    parts = max(1, len(weights))

    def endless(positions: Sequence[Position]) -> grain.MapDataset:
        if per_document:
            return grain.MapDataset.source(DocumentOrder(positions, per_document, batch, seed))
        if len(positions) > _LONGEST:
            raise UserError(
                f"{len(positions):,} positions are more than can be shuffled, {_LONGEST:,}: raise data.entropy_threshold."
            )
        return grain.MapDataset.source(positions).shuffle(seed=seed).repeat()

    mixed = []
    for first in range(0, len(stages), parts):
        datasets = [endless(positions) for positions in stages[first : first + parts]]
        mixed.append(grain.MapDataset.mix(datasets, weights) if weights else datasets[0])
    if len(mixed) == 1:
        return mixed[0]
    limited = [dataset[:stage_prompts] for dataset in mixed[:-1]]
    return grain.MapDataset.concatenate([*limited, mixed[-1][: sys.maxsize - stage_prompts * len(limited)]])


class DocumentOrder:
    """Positions without end, document by document: all documents in a new order each epoch, some positions of each in a row.

    A batch of a step never holds more than `per_document` positions of a document: an epoch ends with a whole batch, and the
    few documents that do not fill another one are left out of it. A document's positions take turns over the epochs.

    Raises: UserError, where all documents together do not fill a batch.
    """

    def __init__(self, positions: PositionIndex, per_document: int, batch: int, seed: int):
        self._positions, self._per_document, self._seed = positions, per_document, seed
        self._taken_M = np.minimum(positions.counts_M, per_document)
        self._epoch = int(self._taken_M.sum()) // batch * batch
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None
        if not self._epoch:
            raise UserError(
                f"data.positions_per_document={per_document} leaves {int(self._taken_M.sum())} prompts of all documents for "
                f"training.prompts_per_step={batch}: raise it, or give a longer corpus."
            )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Position:
        epoch, slot = divmod(int(index), self._epoch)
        documents, first = self._order(epoch)
        place = int(np.searchsorted(first, slot, side="right")) - 1
        document, count = int(documents[place]), int(self._positions.counts_M[documents[place]])
        turn = (epoch * self._per_document + slot - int(first[place])) % count
        own = np.random.default_rng((self._seed, document)).permutation(count)[turn]
        return self._positions[self._positions.first(document) + int(own)]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._cached is None or self._cached[0] != epoch:
            documents = np.random.default_rng((self._seed, epoch, 1)).permutation(len(self._taken_M))
            self._cached = epoch, documents, np.concatenate([[0], np.cumsum(self._taken_M[documents], dtype=np.int64)])
        return self._cached[1:]


def example_stream(
    make: Callable[[int, np.random.Generator], dict[str, np.ndarray]], documents: int, *, batch: int, seed: int
) -> grain.DatasetIterator:
    """Yield batches of `make(document, rng)` without end; the generator is a function of (seed, index)."""

    def build(element: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return make(element, rng)

    dataset = grain.MapDataset.range(documents).shuffle(seed=seed).repeat().random_map(build, seed=seed)
    return iter(dataset.batch(batch, drop_remainder=True).to_iter_dataset(_READING))
