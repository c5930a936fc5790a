"""grain pipelines: prompt order as a function of (seed, index), and streams whose state is a small JSON object."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.infra.signals import end_with_parent
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position, PositionIndex

# grain's default would build 500 batches ahead: too much memory, and CPU time that the training process needs.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_MAX_SHUFFLED = 2**32 - 1  # Elements that grain can shuffle.


class PositionOrder(NamedTuple):
    """An infinite order of positions.

    Attributes:
      positions: the order.
      per_pass: positions of it after which one comes again; of a mixture with weights, in the part where that is soonest.
    """

    positions: grain.MapDataset
    per_pass: float


class PromptStream:
    """Infinite iterator over batches of prompts, in given orders of positions: one for each stage of training.

    The state is the stage, the index of the next batch and that of the first batch of the current order. It does not depend on
    the number of processes or workers, which may change between runs. The index of a prompt in the stream is its id, so the
    random numbers of its samples are the same after a restart.

    Attributes:
      stages: number of stages.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        windows: Sequence[Sequence[int]],
        orders: Sequence[PositionOrder],
        *,
        batch: int,
        workers: int = 0,
        process: tuple[int, int] = (0, 1),
    ):
        """
        Args:
          builder: builds the prompt of a position.
          windows: token ids of the windows that positions refer to.
          orders: positions of each stage, as `position_order` returns them.
          batch: prompts in a batch, over all processes.
          workers: processes that build batches ahead; 0 = a thread of this process.
          process: (index, count): this process builds the index-th of `count` equal parts of every batch.

        Raises: ValueError, if `batch` is not a multiple of the number of processes.
        """
        index, count = process
        if batch % count:
            raise ValueError(f"a batch of {batch} cannot be split over {count} processes")
        self._builder = builder
        self._windows = windows
        self._batch = batch
        self._workers = workers
        self._local_part = slice(index * batch // count, (index + 1) * batch // count)
        self._next_batch = 0
        self._stage = 0
        self._first_batch = 0
        self._cut_fractions: list[float] = []  # Of the batches since the last `take_metrics`.
        self._orders = list(orders)
        self.stages = len(self._orders)
        self._iterator = self._make_iterator()

    def switch_orders(self, orders: Sequence[PositionOrder]) -> None:
        """Take the following batches from the beginning of the first of other orders."""
        self._orders = list(orders)
        self.stages = len(self._orders)
        self._open_stage(0)

    def enter_stage(self, stage: int) -> None:
        """Take the following batches from the order of a stage: from its beginning, unless it is the current one."""
        if stage != self._stage:
            self._open_stage(stage)

    def close(self) -> None:
        """Stop the workers and free the shared memory of the batches that they have built ahead."""
        self._iterator.close()

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> PromptBatch:
        batch = next(self._iterator)
        self._next_batch += 1
        self._cut_fractions.append(float((batch.position_P > self._builder.max_context_tokens).mean()))
        return batch

    def take_metrics(self) -> dict[str, float]:
        """Return scalars about the batches since the last call, at least one, by their names in metrics.jsonl."""
        drawn = (self._next_batch - self._first_batch) * self._batch
        cut_fractions = self._cut_fractions
        self._cut_fractions = []
        return {"data/passes": drawn / self._orders[self._stage].per_pass, "data/cut": float(np.mean(cut_fractions))}

    def get_state(self) -> dict[str, int]:
        """Return the state for `set_state`, as JSON values."""
        return {"batch": self._next_batch, "first": self._first_batch, "stage": self._stage}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue where a stream with the same orders was."""
        self._stage = state["stage"]
        self._next_batch = state["batch"]
        self._first_batch = state["first"]
        self._replace_iterator()

    def _open_stage(self, stage: int) -> None:
        self._stage = stage
        self._first_batch = self._next_batch
        self._replace_iterator()

    def _replace_iterator(self) -> None:
        self.close()
        self._iterator = self._make_iterator()

    def _make_iterator(self) -> grain.DatasetIterator:
        # Local variables, because workers receive these functions and `self` holds an iterator that cannot be pickled.
        builder = self._builder
        windows = self._windows
        local_part = self._local_part
        first_id = self._first_batch * self._batch

        def add_id(index: int, position: Position) -> tuple[int, Position]:
            return first_id + index, position

        def build(prompts: Sequence[tuple[int, Position]]) -> PromptBatch:
            return stack([builder.build(i, windows[p.window], p) for i, p in prompts[local_part]])

        order = self._orders[self._stage].positions
        batches = order.map_with_index(add_id).batch(self._batch, drop_remainder=True, batch_fn=list).map(build)
        remaining = batches[self._next_batch - self._first_batch :].to_iter_dataset(_READ_OPTIONS)
        if self._workers:
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            remaining = remaining.mp_prefetch(options, worker_init_fn=lambda *_: end_with_parent())
        return iter(remaining)


def position_order(
    parts: Sequence[Sequence[Position]],
    weights: Sequence[float],
    *,
    batch: int,
    per_window: int,
    seed: tuple[int, ...],
) -> PositionOrder:
    """Return an infinite order of positions, shuffled anew in every epoch; a function of (seed, index).

    Args:
      parts: the positions of each part of a mixture; a single element if there is none.
      weights: sampling weights of the parts; [] = one part.
      batch: prompts in a batch.
      per_window: maximum number of positions of a window in a batch (see `WindowOrder`); 0 = no limit, and positions are
        shuffled independently.
      seed: of the shuffling; each part has its own shuffles.

    Raises: UserError, if there are more positions than can be shuffled, too few for `per_window`, or weights beside it: a part's
      epochs do not end with batches, so that a batch could have a window twice.
    """
    if weights and per_window:
        raise UserError(
            f"data.positions_per_window={per_window} cannot be kept in a mixture with weights: set it to 0, or leave the weights "
            "in data.path out.",
            field="data.positions_per_window",
        )
    shuffled = [
        _shuffle(positions, batch=batch, per_window=per_window, seed=(*seed, part))
        for part, positions in enumerate(parts)
    ]
    if not weights:
        return PositionOrder(positions=grain.MapDataset.source(shuffled[0]), per_pass=shuffled[0].per_pass)
    orders = [grain.MapDataset.source(order) for order in shuffled]
    per_pass = min(len(part) * sum(weights) / weight for part, weight in zip(parts, weights, strict=True))
    return PositionOrder(positions=grain.MapDataset.mix(orders, weights), per_pass=per_pass)


def _shuffle(
    positions: Sequence[Position], *, batch: int, per_window: int, seed: tuple[int, ...]
) -> ShuffledEpochs | WindowOrder:
    if per_window:
        if not isinstance(positions, PositionIndex):
            raise TypeError("per_window needs positions that are grouped by window, a PositionIndex")
        return WindowOrder(positions, per_window=per_window, batch=batch, seed=seed)
    if len(positions) > _MAX_SHUFFLED:
        raise UserError(
            f"{len(positions):,} positions were chosen, but at most {_MAX_SHUFFLED:,} can be shuffled: choose fewer with "
            "data.positions and its fields, or set data.positions_per_window, which shuffles windows.",
            field="data.positions",
        )
    return ShuffledEpochs(positions, seed)


def epoch_seed(seed: tuple[int, ...], epoch: int) -> int:
    """Return a 32-bit seed for an epoch, independent of those of other epochs and other seeds.

    grain's own rule, seed + epoch, would give epoch 2 of one seed the order of epoch 1 of the next.
    """
    return int(np.random.SeedSequence((*seed, epoch)).generate_state(1)[0])


class ShuffledEpochs:
    """Infinite order of some items, shuffled anew in every epoch; a function of (seed, index).

    Attributes:
      per_pass: number of items, after which one comes again.
    """

    def __init__(self, items: Sequence[Any], seed: tuple[int, ...]):
        self.per_pass = len(items)
        self._items = items
        self._seed = seed
        self._cached_epoch: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Any:
        epoch, slot = divmod(int(index), len(self._items))
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            order = grain.MapDataset.range(len(self._items)).shuffle(seed=epoch_seed(self._seed, epoch))
            self._cached_epoch = epoch, order
        return self._items[self._cached_epoch[1][slot]]


class WindowOrder:
    """Infinite order of positions with at most `per_window` positions of a window in any batch.

    Every epoch visits the windows in a new order and takes up to `per_window` positions of each in a row. An epoch is a whole
    number of batches; windows that would fill only a part of another batch are left out of it. The positions of a window take
    turns over the epochs.

    Attributes:
      per_pass: positions of the order after which one comes again: that of a window with the fewest positions.
    """

    def __init__(self, positions: PositionIndex, *, per_window: int, batch: int, seed: tuple[int, ...]):
        """Raises: UserError, if one epoch does not fill a batch."""
        self._positions = positions
        self._per_window = per_window
        self._seed = seed
        self._taken_M = np.minimum(positions.counts_M, per_window)
        total = int(self._taken_M.sum())
        self._epoch_prompts = total // batch * batch
        self._cached_epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        if not self._epoch_prompts:
            raise UserError(
                f"data.positions_per_window={per_window} leaves {total} prompts in all windows together, fewer than "
                f"training.prompts_per_step={batch}: raise it, or use a longer corpus.",
                field="data.positions_per_window",
            )
        fewest = int(positions.counts_M[positions.counts_M > 0].min())
        self.per_pass = self._epoch_prompts * max(1, fewest // per_window)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Position:
        epoch, slot = divmod(int(index), self._epoch_prompts)
        shuffled_M, first_slot_M = self._shuffle_windows(epoch)
        place = int(np.searchsorted(first_slot_M, slot, side="right")) - 1
        m = int(shuffled_M[place])
        count = int(self._positions.counts_M[m])
        # Consecutive epochs take consecutive positions of a fixed random order of the window's positions.
        turn = (epoch * self._per_window + slot - int(first_slot_M[place])) % count
        chosen = np.random.default_rng((*self._seed, m)).permutation(count)[turn]
        return self._positions[self._positions.first_index(m) + int(chosen)]

    def _shuffle_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the windows in an epoch, and the first slot of each in that order."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            shuffled_M = np.random.default_rng((*self._seed, epoch, 1)).permutation(len(self._taken_M))
            first_slot = np.concatenate([[0], np.cumsum(self._taken_M[shuffled_M], dtype=np.int64)])
            self._cached_epoch = epoch, shuffled_M, first_slot
        return self._cached_epoch[1], self._cached_epoch[2]


def example_stream(
    make: Callable[[int, np.random.Generator], dict[str, np.ndarray]], documents: int, *, batch: int, seed: int
) -> grain.DatasetIterator:
    """Return an infinite iterator over batches of pre-training examples, every document once an epoch.

    Args:
      make: returns the example of a document index; its generator is a function of (seed, index in the stream).
      documents: number of documents.
      batch: examples in a batch.
      seed: of the order and of the generators.
    """
    order = ShuffledEpochs(range(documents), (seed,))
    dataset = grain.MapDataset.source(order).random_map(make, seed=seed)
    return iter(dataset.batch(batch, drop_remainder=True).to_iter_dataset(_READ_OPTIONS))
