"""grain pipelines: an order that is a function of (seed, index), and iterators whose state is one small JSON object."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grain
import numpy as np

from rpt_jax.data.positions import Position
from rpt_jax.data.prompts import PromptBatch, PromptBuilder, stack

# grain would by default build 500 batches ahead: memory, and time on cores that are busy.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def prompt_stream(
    builder: PromptBuilder, documents: Sequence[Sequence[int]], positions: Sequence[Position], *, batch: int, seed: int
) -> grain.DatasetIterator:
    """Yield `PromptBatch`es of token positions without end: all positions in a new order each epoch.

    A prompt's id is its number in the stream, so that the noise of its samples outlives restarts.
    """

    def build(index: int, position: Position) -> PromptBatch:
        return builder.build(index, documents[position.document], position)

    dataset = grain.MapDataset.source(positions).shuffle(seed=seed).repeat().map_with_index(build)
    return iter(dataset.batch(batch, drop_remainder=True, batch_fn=stack).to_iter_dataset(_READING))


def example_stream(
    make: Callable[[int, np.random.Generator], dict[str, np.ndarray]], documents: int, *, batch: int, seed: int
) -> grain.DatasetIterator:
    """Yield batches of `make(document, rng)` without end; the generator is a function of (seed, index)."""

    def build(element: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return make(element, rng)

    dataset = grain.MapDataset.range(documents).shuffle(seed=seed).repeat().random_map(build, seed=seed)
    return iter(dataset.batch(batch, drop_remainder=True).to_iter_dataset(_READING))
