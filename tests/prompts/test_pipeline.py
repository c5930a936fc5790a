"""The order of prompts: a function of (seed, index), whatever the processes, workers and restarts."""

from __future__ import annotations

import collections
import functools
import json

import grain
import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.store import Records, ShardWriter
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.pipeline import PromptStream, position_order
from rpt_jax.prompts.positions import Choice, Position, PositionIndex
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import TINY

TOKENIZER = load_tokenizer(TINY)
DOCUMENTS = [TOKENIZER.encode(f"Document {i} is of {i} words" + " and more" * i) for i in range(12)]
BUILDER = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), TOKENIZER)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PositionIndex:
    """The third and later tokens of every document but the first."""
    directory = tmp_path_factory.mktemp("index")
    with ShardWriter(directory, "scores", 0, 1) as writer:
        for ids in DOCUMENTS:
            writer.write((np.arange(len(ids)), np.arange(len(ids))), [len(ids)])
        writer.commit({})
    counts = np.array([len(ids) - 3 for ids in DOCUMENTS[1:]], np.uint32)
    choice, numbers = Choice(2.0, np.inf, 1.0, 0, True, 0), np.arange(len(DOCUMENTS))
    return PositionIndex(Records(directory, "scores", 1), numbers, choice, numbers[1:].astype(np.uint32), counts)


order = functools.partial(position_order, stage_prompts=0, batch=8, per_document=0, seed=0)


def take(stream: collections.abc.Iterator[PromptBatch], count: int) -> list[PromptBatch]:
    return [next(stream) for _ in range(count)]


def where(batches: list[PromptBatch]) -> list[tuple[int, int]]:
    return [(int(d), int(p)) for batch in batches for d, p in zip(batch.window_P, batch.position_P, strict=True)]


def test_an_index_is_the_list_of_its_positions(index: PositionIndex) -> None:
    expected = [Position(d, i, float(i)) for d, ids in enumerate(DOCUMENTS) if d for i in range(3, len(ids))]
    assert list(index) == expected and index[-1] == expected[-1]
    half = index.only(np.arange(len(DOCUMENTS)) % 2 == 0)
    assert list(half) == [p for p in expected if p.document % 2 == 0]


@pytest.mark.parametrize("per_document", [0, 2])
def test_processes_share_a_batch_and_do_not_change_it(index: PositionIndex, per_document: int) -> None:
    batches = take(PromptStream(BUILDER, DOCUMENTS, order([index], [], per_document=per_document), batch=8), 5)
    for count in (2, 4):
        parts = [
            take(
                PromptStream(
                    BUILDER, DOCUMENTS, order([index], [], per_document=per_document), batch=8, process=(p, count)
                ),
                5,
            )
            for p in range(count)
        ]
        for whole, *mine in zip(batches, *parts, strict=True):
            for name, ours in whole._asdict().items():
                np.testing.assert_array_equal(
                    ours, np.concatenate([getattr(part, name) for part in mine]), err_msg=name
                )


def test_parts_of_a_mixture_come_by_their_weights(index: PositionIndex) -> None:
    even = np.arange(len(DOCUMENTS)) % 2 == 0
    stream = PromptStream(BUILDER, DOCUMENTS, order([index.only(even), index.only(~even)], [3.0, 1.0]), batch=8)
    found = where(take(stream, 200))
    share = sum(document % 2 == 0 for document, _ in found) / len(found)
    assert abs(share - 0.75) < 0.01
    size = len(index.only(~even))
    assert size < 400
    first = [place for place in found if place[0] % 2][:size]
    assert len(set(first)) == size, "a part repeats nothing before its epoch is over"


def test_stages_of_a_curriculum_follow_each_other(index: PositionIndex) -> None:
    stages = [list(index)[i::3] for i in range(3)]
    stream = PromptStream(BUILDER, DOCUMENTS, order(stages, [], stage_prompts=24), batch=8)
    found, sets = where(take(stream, 20)), [{(p.document, p.position) for p in stage} for stage in stages]
    assert set(found[:24]) <= sets[0] and set(found[24:48]) <= sets[1] and set(found[48:]) == sets[2]
    even = np.arange(len(DOCUMENTS)) % 2 == 0
    parts = [index.only(even), index.only(~even)] * 2
    mixed = where(take(PromptStream(BUILDER, DOCUMENTS, order(parts, [1.0, 1.0], stage_prompts=8), batch=8), 4))
    assert sum(document % 2 for document, _ in mixed) == 16


@pytest.mark.parametrize("per_document", [1, 2, 5])
def test_at_most_so_many_positions_of_a_document_in_a_batch(index: PositionIndex, per_document: int) -> None:
    batches = take(PromptStream(BUILDER, DOCUMENTS, order([index], [], per_document=per_document), batch=8), 400)
    for batch in batches:
        assert max(collections.Counter(batch.window_P.tolist()).values()) <= per_document
        assert len(set(where([batch]))) == 8
    found = where(batches)
    assert set(found) == {(p.document, p.position) for p in index}, "every position has its turn"
    with pytest.raises(UserError, match="data.positions_per_document=2 leaves 22 prompts"):
        order([index], [], per_document=2, batch=23)


def test_a_stream_goes_on_with_other_workers(index: PositionIndex) -> None:
    """Worker processes build the same batches in the same order, here on the second of two hosts; the state knows neither."""
    plain = PromptStream(BUILDER, DOCUMENTS, order([index], []), batch=8)
    take(plain, 3)
    state = json.loads(json.dumps(plain.get_state()))
    expected = take(plain, 5)
    worked = PromptStream(BUILDER, DOCUMENTS, order([index], []), batch=8, workers=2, process=(1, 2))
    worked.set_state(state)
    for ours, theirs in zip(take(worked, 5), expected, strict=True):
        for name in theirs._fields:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name)[4:], err_msg=name)
    assert worked.get_state() == plain.get_state()


def test_more_positions_than_can_be_shuffled_are_refused() -> None:
    class Endless(collections.abc.Sequence):
        def __len__(self) -> int:
            return 2**32

        def __getitem__(self, index: int) -> Position:
            return Position(0, 0, 0.0)

    with pytest.raises(UserError, match="4,294,967,296 positions are more than can be shuffled"):
        order([Endless()], [])
    assert isinstance(order([[Position(0, 0, 0.0)]], []), grain.MapDataset)
