"""Streams of prompts and examples: a function of (seed, index), independent of processes, workers and restarts."""

from __future__ import annotations

import collections
import functools
import json
import multiprocessing
import threading

import grain
import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.store import Records, ShardWriter
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.pipeline import PromptStream, ShuffledEpochs, example_stream, position_order
from rpt_jax.prompts.positions import Entropies, EntropyRule, Position, PositionIndex
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import TINY
from tests.helpers.processes import CHILD_SECONDS

TOKENIZER = load_tokenizer(TINY)
DOCUMENTS = [TOKENIZER.encode(f"Document {i} is of {i} words" + " and more" * i) for i in range(12)]
BUILDER = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), TOKENIZER)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PositionIndex:
    """The fourth and later tokens of every document but the first; a token's entropy is its position."""
    directory = tmp_path_factory.mktemp("index")
    with ShardWriter(directory, "scores", 0, 1) as writer:
        for ids in DOCUMENTS:
            writer.write((np.arange(len(ids)), np.arange(len(ids))), [len(ids)])
        writer.commit({})
    counts = np.array([len(ids) - 3 for ids in DOCUMENTS[1:]], np.uint32)
    with ShardWriter(directory, "tokens", 0, 1) as writer:
        for ids in DOCUMENTS:
            writer.write((ids, np.ones(len(ids))), [len(ids)])
        writer.commit({})
    every_token_V = np.ones(TOKENIZER.vocab_size, bool)
    return PositionIndex(
        entropies=Entropies(Records(directory, "scores", 1), Records(directory, "tokens", 1), every_token_V),
        record_numbers_W=np.arange(len(DOCUMENTS)),
        rule=EntropyRule(low=2.0, min_context=0, renormalized=True, seed=0),
        windows_M=np.arange(1, len(DOCUMENTS), dtype=np.uint32),
        counts_M=counts,
    )


order = functools.partial(position_order, batch=8, per_window=0, seed=(0,))


def take(stream: collections.abc.Iterator, count: int) -> list:
    return [next(stream) for _ in range(count)]


def positions_of(batches: list[PromptBatch]) -> list[tuple[int, int]]:
    """Return the window and the position of every prompt."""
    return [(int(d), int(p)) for batch in batches for d, p in zip(batch.window_P, batch.position_P, strict=True)]


def test_an_index_is_the_sequence_of_its_positions(index: PositionIndex) -> None:
    expected = [Position(d, i, float(i)) for d, ids in enumerate(DOCUMENTS) if d for i in range(3, len(ids))]
    assert list(index) == expected
    assert index[-1] == expected[-1]
    even = index.restrict_to(np.arange(len(DOCUMENTS)) % 2 == 0)
    assert list(even) == [p for p in expected if p.window % 2 == 0]


@pytest.mark.parametrize("per_window", [0, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_all_processes_make_up_the_batch(index: PositionIndex, per_window: int, count: int) -> None:
    def batches(process: tuple[int, int]) -> list[PromptBatch]:
        positions = order([index], [], per_window=per_window)
        return take(PromptStream(BUILDER, DOCUMENTS, [positions], batch=8, process=process), 5)

    parts = [batches((number, count)) for number in range(count)]
    for whole, *of_processes in zip(batches((0, 1)), *parts, strict=True):
        for name, array in whole._asdict().items():
            joined = np.concatenate([getattr(part, name) for part in of_processes])
            np.testing.assert_array_equal(array, joined, err_msg=name)


def test_a_batch_must_be_divisible_by_the_number_of_processes(index: PositionIndex) -> None:
    with pytest.raises(ValueError, match="8 cannot be split over 3"):
        PromptStream(BUILDER, DOCUMENTS, [order([index], [])], batch=8, process=(0, 3))


def test_parts_of_a_mixture_are_sampled_by_their_weights(index: PositionIndex) -> None:
    even = np.arange(len(DOCUMENTS)) % 2 == 0
    mixture = order([index.restrict_to(even), index.restrict_to(~even)], [3.0, 1.0])
    stream = PromptStream(BUILDER, DOCUMENTS, [mixture], batch=8)
    found = positions_of(take(stream, 200))
    fraction = sum(window % 2 == 0 for window, _ in found) / len(found)
    assert abs(fraction - 0.75) < 0.01
    size = len(index.restrict_to(~even))
    assert size < 400
    first_epoch = [(window, position) for window, position in found if window % 2][:size]
    assert len(set(first_epoch)) == size, "a position was repeated within an epoch"


def test_a_stream_counts_its_passes_and_the_prompts_that_it_cuts(index: PositionIndex) -> None:
    stage, other = list(index)[::2], list(index)[1::4]
    stream = PromptStream(BUILDER, DOCUMENTS, [order([stage], []), order([other], [])], batch=8)
    for batches in (1, 3):
        positions = concatenate(take(stream, batches), "position_P")
        metrics = stream.take_metrics()
        assert metrics["data/cut"] == pytest.approx(np.mean(positions > BUILDER.max_context_tokens))
    assert 0 < metrics["data/cut"] < 1
    assert metrics["data/passes"] == pytest.approx(4 * 8 / len(stage))

    # The passes of a restored stream are those of its stage.
    stream.enter_stage(1)
    take(stream, 1)
    restored = PromptStream(BUILDER, DOCUMENTS, [order([stage], []), order([other], [])], batch=8)
    restored.set_state(stream.get_state())
    take(restored, 1)
    assert restored.take_metrics()["data/passes"] == pytest.approx(2 * 8 / len(other))


def test_the_passes_of_a_mixture_are_those_of_its_smallest_part(index: PositionIndex) -> None:
    parts = [list(index)[:10], list(index)[10:60]]
    found = positions_of(take(PromptStream(BUILDER, DOCUMENTS, [order(parts, [1.0, 1.0])], batch=8), 20))
    first = {(p.window, p.position) for p in parts[0]}
    drawn = sum(place in first for place in found)
    stream = PromptStream(BUILDER, DOCUMENTS, [order(parts, [1.0, 1.0])], batch=8)
    take(stream, 20)
    assert stream.take_metrics()["data/passes"] == pytest.approx(drawn / 10, abs=0.2)


def test_a_stream_takes_its_positions_from_the_stage_that_it_is_in(index: PositionIndex) -> None:
    stages = [list(index)[i::3] for i in range(3)]
    sets = [{(p.window, p.position) for p in stage} for stage in stages]

    def start() -> PromptStream:
        return PromptStream(BUILDER, DOCUMENTS, [order([stage], []) for stage in stages], batch=8)

    stream, found = start(), []
    for stage, batches in enumerate((3, 1, 12)):
        stream.enter_stage(stage)
        found.append(take(stream, batches))
    assert set(positions_of(found[0])) <= sets[0]
    assert set(positions_of(found[1])) <= sets[1]
    assert set(positions_of(found[2])) == sets[2]
    assert concatenate(sum(found, []), "ids_P").tolist() == list(range(128))

    # A restored stream continues within its stage, and its next stage begins where it is entered.
    stream = start()
    take(stream, 2)
    stream.enter_stage(1)
    take(stream, 1)
    restored = start()
    restored.set_state(json.loads(json.dumps(stream.get_state())))
    for stage in (1, 1, 2, 2):
        for each in (stream, restored):
            each.enter_stage(stage)
        assert_same_batches([next(stream)], [next(restored)])


def test_epochs_and_seeds_have_independent_orders() -> None:
    """A seed plus the number of an epoch would give the second epoch of a seed the order of the first of the next seed."""
    items = list(range(50))
    orders = [ShuffledEpochs(items, (seed,)) for seed in range(4)]
    epochs = [tuple(order[i] for i in range(50 * epoch, 50 * (epoch + 1))) for order in orders for epoch in range(4)]
    assert len(set(epochs)) == 16
    assert all(sorted(epoch) == items for epoch in epochs)
    assert orders[1][60] == orders[1][60] == epochs[5][10]
    correlations = np.corrcoef(np.array(epochs))[np.triu_indices(16, k=1)]
    assert abs(correlations).max() < 0.6  # Four standard deviations of 1 / sqrt(49).


def test_the_parts_of_a_mixture_have_independent_orders() -> None:
    parts = [[Position(part, i, 0.0) for i in range(40)] for part in range(2)]
    mixture = order(parts, [1.0, 1.0])
    first = [mixture.positions[i] for i in range(80)]
    orders = [[p.position for p in first if p.window == part] for part in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


@pytest.mark.parametrize("per_window", [1, 2, 5])
def test_a_batch_holds_at_most_a_given_number_of_positions_of_a_window(index: PositionIndex, per_window: int) -> None:
    batches = take(PromptStream(BUILDER, DOCUMENTS, [order([index], [], per_window=per_window)], batch=8), 400)
    for batch in batches:
        assert max(collections.Counter(batch.window_P.tolist()).values()) <= per_window
        assert len(set(positions_of([batch]))) == 8
    found = positions_of(batches)
    assert set(found) == {(p.window, p.position) for p in index}, "some positions never appear"


def test_a_limit_on_the_positions_of_a_window_is_refused_in_a_mixture_with_weights(index: PositionIndex) -> None:
    with pytest.raises(UserError) as raised:
        order([index, index], [0.7, 0.3], per_window=1)
    assert raised.value.field == "data.positions_per_window"


@pytest.mark.parametrize("per_window", [0, 1, 2, 5])
def test_a_position_comes_again_after_a_pass(index: PositionIndex, per_window: int) -> None:
    positions, per_pass = order([index], [], per_window=per_window)
    found = [(p.window, p.position) for p in (positions[i] for i in range(2 * int(per_pass)))]
    assert len(set(found[: int(per_pass)])) == per_pass and len(set(found)) < len(found)


def test_too_few_positions_for_a_batch_are_rejected(index: PositionIndex) -> None:
    assert order([index], [], per_window=2, batch=22)  # Two of each of 11 windows.
    with pytest.raises(UserError) as raised:
        order([index], [], per_window=2, batch=23)
    assert raised.value.field == "data.positions_per_window"


def test_a_restored_stream_may_have_another_number_of_workers_and_processes(index: PositionIndex) -> None:
    """Worker processes build the same batches in the same order, here the second half of each batch."""
    plain = PromptStream(BUILDER, DOCUMENTS, [order([index], [])], batch=8)
    take(plain, 3)
    state = json.loads(json.dumps(plain.get_state()))
    expected = take(plain, 5)
    parallel = PromptStream(BUILDER, DOCUMENTS, [order([index], [])], batch=8, workers=2, process=(1, 2))
    parallel.set_state(state)
    for half, whole in zip(take(parallel, 5), expected, strict=True):
        for name in whole._fields:
            np.testing.assert_array_equal(getattr(half, name), getattr(whole, name)[4:], err_msg=name)
    assert parallel.get_state() == plain.get_state()
    parallel.close()
    assert not [child for child in multiprocessing.active_children() if "grain" in child.name], "the workers have ended"


def test_more_positions_than_can_be_shuffled_are_rejected() -> None:
    class TooMany(collections.abc.Sequence):
        def __len__(self) -> int:
            return 2**32

        def __getitem__(self, index: int) -> Position:
            return Position(0, 0, 0.0)

    with pytest.raises(UserError) as raised:
        order([TooMany()], [])
    assert raised.value.field == "data.positions"
    assert isinstance(order([[Position(0, 0, 0.0)]], []).positions, grain.MapDataset)


def open_stream(seed: int = 0, batch: int = 4, count: int = 10) -> PromptStream:
    """Open a stream over the first `count` of ten positions in three documents."""
    positions = [Position(i % 3, i, float(i)) for i in range(10)]
    return PromptStream(BUILDER, DOCUMENTS, [order([positions[:count]], [], batch=batch, seed=(seed,))], batch=batch)


def assert_same_batches(ours: list[PromptBatch], theirs: list[PromptBatch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in a._fields:
            x, y = getattr(a, name), getattr(b, name)
            np.testing.assert_array_equal(x, y, err_msg=name)
            assert x.dtype == y.dtype


def concatenate(batches: list[PromptBatch], name: str) -> np.ndarray:
    return np.concatenate([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize("count", [10, 3])
def test_every_position_appears_once_an_epoch(count: int) -> None:
    """With any batch size: 20 prompts are two epochs of 10, and a batch of 4 spans epochs of 3."""
    batches = take(open_stream(count=count), 5 * count)
    positions = concatenate(batches, "position_P").reshape(-1, count)
    np.testing.assert_array_equal(np.sort(positions, axis=1), np.tile(np.arange(count), (20, 1)))
    assert len(np.unique(positions, axis=0)) > 3, "all epochs have the same order"
    np.testing.assert_array_equal(concatenate(batches, "ids_P"), np.arange(20 * count))


def test_the_order_is_a_function_of_the_seed() -> None:
    assert_same_batches(take(open_stream(), 5), take(open_stream(), 5))
    orders = {tuple(concatenate(take(open_stream(seed), 5), "position_P")) for seed in range(4)}
    assert len(orders) == 4


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    other = concatenate(take(open_stream(batch=5), 4), "position_P")
    np.testing.assert_array_equal(other, concatenate(take(open_stream(), 5), "position_P"))


@pytest.mark.parametrize("consumed", [0, 1, 4])
def test_a_stream_continues_where_its_state_says(consumed: int) -> None:
    first = open_stream()
    take(first, consumed)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 4)
    restored = open_stream()
    take(restored, 2)
    restored.set_state(state)
    assert_same_batches(take(restored, 4), expected)


def test_a_batch_is_the_stack_of_its_prompts() -> None:
    batch = next(open_stream())
    rows = zip(batch.ids_P, batch.window_P, batch.position_P, batch.entropy_P, strict=True)
    singles = [BUILDER.build(i, DOCUMENTS[window], Position(window, p, e)) for i, window, p, e in rows]
    assert_same_batches([stack(singles)], [batch])


def test_random_examples_are_a_function_of_seed_and_index() -> None:
    """A document has other examples in every epoch, and an interrupted run the same ones as one that was not."""

    def make(document: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"document": np.int32(document), "draw": rng.integers(0, 2**30)}

    def start(seed: int = 0) -> grain.DatasetIterator:
        return example_stream(make, 6, batch=3, seed=seed)

    batches = take(start(), 4)
    for epoch in (batches[:2], batches[2:]):
        assert sorted(np.concatenate([batch["document"] for batch in epoch])) == list(range(6))
    assert len(np.unique([batch["draw"] for batch in batches])) == 12
    interrupted = start()
    take(interrupted, 1)
    state = json.loads(json.dumps(interrupted.get_state()))
    restored = start()
    restored.set_state(state)
    for ours, theirs in zip(take(restored, 3), batches[1:], strict=True):
        np.testing.assert_array_equal(ours["draw"], theirs["draw"])
    assert (next(start(1))["draw"] != batches[0]["draw"]).all()


def test_few_batches_are_built_ahead() -> None:
    """The reader gets time to fill its buffer before every step, and never holds more than a few batches."""
    batch, filled, most = 3, 2, 4
    built = 0
    changed = threading.Condition()

    def make(document: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        nonlocal built
        with changed:
            built += 1
            changed.notify_all()
        return {"draw": rng.integers(0, 9)}

    stream = example_stream(make, 6, batch=batch, seed=0)
    for consumed in range(1, 50):
        next(stream)
        with changed:
            assert changed.wait_for(lambda n=consumed: built >= batch * (n + filled), timeout=CHILD_SECONDS)
            assert built <= batch * (consumed + most)
