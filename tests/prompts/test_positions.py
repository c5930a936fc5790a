"""Choices of positions, and the index over the positions of a corpus."""

from __future__ import annotations

import dataclasses
import multiprocessing
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rpt_jax.config import DataConfig
from rpt_jax.corpus.store import Records, ShardWriter
from rpt_jax.prompts import positions
from rpt_jax.prompts.positions import (
    CURRICULUM_STAGES,
    Entropies,
    EntropyReader,
    Position,
    PositionRule,
    choose_positions,
    every_position,
    index_positions,
    quantiles,
)
from rpt_jax.registry import PositionRequirements, Registry

# The records of the training windows, among 30 records.
RECORD_NUMBERS = np.array([1, 2, 3, 5, 8, 13, 21, 29])
MIN_CONTEXT = 3
VOCAB = 20
BOXABLE_V = np.arange(VOCAB) % 7 != 2  # A box can hold all tokens but 2, 9 and 16.


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Random entropies; the plain ones are half of the renormalized ones."""
    directory, rng = tmp_path_factory.mktemp("scores"), np.random.default_rng(1)
    with ShardWriter(directory, "scores", 0, 1) as writer:
        for _ in range(30):
            entropy = rng.exponential(1.0, rng.integers(1, 50)).astype(np.float32)
            entropy[rng.random(len(entropy)) < 0.1] = -1.0  # Special tokens.
            writer.write((entropy, entropy / 2), [len(entropy)])
        writer.commit({})
    return Records(directory, "scores", 1)


@pytest.fixture(scope="module")
def tokens(scores: Records, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Random token ids of the same windows."""
    directory, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(2)
    with ShardWriter(directory, "tokens", 0, 1) as writer:
        for entropy, _ in scores:
            ids = rng.integers(0, VOCAB, len(entropy))
            writer.write((ids, np.ones(len(ids))), [len(ids)])
        writer.commit({})
    return Records(directory, "tokens", 1)


@pytest.fixture(scope="module")
def readable(scores: Records, tokens: Records) -> Entropies:
    return Entropies(scores, tokens, BOXABLE_V)


@pytest.fixture(scope="module")
def entropies(scores: Records, tokens: Records) -> dict[tuple[int, int], float]:
    """The entropy of every position that may be chosen."""
    return {
        (window, i): float(entropy)
        for window, number in enumerate(RECORD_NUMBERS)
        for i, entropy in enumerate(scores[int(number)][0])
        if i >= MIN_CONTEXT and entropy >= 0 and tokens[int(number)][0][i] not in (2, 9, 16)
    }


def through_a_pipe(value: Any) -> Any:
    """Return what a worker process receives; small values only, because the pipe has to hold them."""
    sender, receiver = multiprocessing.Pipe()
    with sender, receiver:
        sender.send(value)
        return receiver.recv()


def choose(entropies: Entropies, **fields: object) -> list[set[tuple[int, int]]]:
    """Return the chosen (window, position)s of every stage, read from a pickled index."""
    config = dataclasses.replace(DataConfig(min_context=MIN_CONTEXT), **fields)
    stages = []
    for index in index_positions(config, entropies, RECORD_NUMBERS):
        chosen = list(through_a_pipe(index))
        assert chosen == sorted(chosen)
        assert len(chosen) == len(set(chosen)) == len(index)
        for p in chosen:
            [record] = entropies.read([int(RECORD_NUMBERS[p.window])])
            entropy_S = record[0 if config.entropy_renormalized else 1]
            assert p.position >= MIN_CONTEXT
            assert p.entropy == entropy_S[p.position] >= 0
        stages.append({(p.window, p.position) for p in chosen})
    return stages


def test_evaluation_positions_are_above_the_threshold_and_have_context() -> None:
    entropies = [np.array(entropy, np.float32) for entropy in ([9, 9, 0.5, 0.6, 2], [9], [9, 9, 9, 0.1])]
    windows = [np.zeros(len(entropy_S), np.uint32) for entropy_S in entropies]
    chosen, left_out = choose_positions(windows, entropies, BOXABLE_V, threshold=0.5, min_context=2)
    assert [(p.window, p.position) for p in chosen] == [(0, 3), (0, 4), (2, 2)]
    np.testing.assert_allclose([p.entropy for p in chosen], [0.6, 2, 9], rtol=1e-6)
    assert left_out == 0
    assert choose_positions(windows, entropies, BOXABLE_V, threshold=10, min_context=0) == ([], 0)


def test_evaluation_leaves_out_positions_that_no_box_can_hold_and_counts_them() -> None:
    windows = [np.array([1, 2, 3, 9, 16, 4]), np.array([2, 2])]
    entropies = [np.array([1, 1, 1, 1, 0.1, 1]), np.ones(2)]
    chosen, left_out = choose_positions(windows, entropies, BOXABLE_V, threshold=0.5, min_context=1)
    assert [(p.window, p.position) for p in chosen] == [(0, 2), (0, 5)]
    assert left_out == 3


def test_left_out_training_positions_are_counted(readable: Entropies, tokens: Records) -> None:
    expected = sum(
        token in (2, 9, 16) for number in RECORD_NUMBERS for token in tokens[int(number)][0][MIN_CONTEXT:].tolist()
    )
    assert readable.count_left_out(RECORD_NUMBERS, MIN_CONTEXT) == expected > 5


def test_every_chooses_all_positions_with_context_except_special_tokens(readable: Entropies, entropies: dict) -> None:
    assert choose(readable, positions="every") == [entropies.keys()]


def test_threshold_chooses_positions_above_it(readable: Entropies, entropies: dict) -> None:
    expected = {position for position, entropy in entropies.items() if entropy > 0.7}
    assert choose(readable, entropy_threshold=0.7) == [expected]
    assert choose(readable, entropy_threshold=0.35, entropy_renormalized=False) == [expected]


def test_quantile_chooses_the_hardest_fraction(readable: Entropies, entropies: dict) -> None:
    [hardest] = choose(readable, positions="quantile", keep_fraction=0.3)
    assert hardest == set(sorted(entropies, key=entropies.__getitem__)[-len(hardest) :])
    assert abs(len(hardest) - 0.3 * len(entropies)) <= 1
    assert choose(readable, positions="quantile", keep_fraction=1.0) == [entropies.keys()]


def test_random_chooses_a_fraction_that_depends_on_the_seed_alone(readable: Entropies, entropies: dict) -> None:
    [chosen] = choose(readable, positions="random", keep_fraction=0.3)
    assert chosen < entropies.keys()
    assert 0.15 < len(chosen) / len(entropies) < 0.45
    assert [chosen] != choose(readable, positions="quantile", keep_fraction=0.3)
    assert [chosen] == choose(readable, positions="random", keep_fraction=0.3)
    assert [chosen] != choose(readable, positions="random", keep_fraction=0.3, seed=1)


def test_the_curriculum_splits_the_threshold_choice_from_easy_to_hard(readable: Entropies, entropies: dict) -> None:
    stages = choose(readable, positions="curriculum", entropy_threshold=0.7)
    assert len(stages) == CURRICULUM_STAGES
    assert [set().union(*stages)] == choose(readable, entropy_threshold=0.7)
    for easy, hard in zip(stages, stages[1:], strict=False):
        assert max(map(entropies.__getitem__, easy)) < min(map(entropies.__getitem__, hard))
        assert abs(len(easy) - len(hard)) <= 2


def test_entropies_may_also_be_given_in_memory(readable: Entropies, scores: Records, tokens: Records) -> None:
    in_memory = {int(number): scores[int(number)] for number in RECORD_NUMBERS}
    for name in ("threshold", "quantile", "curriculum"):
        assert choose(Entropies(in_memory, tokens, BOXABLE_V), positions=name) == choose(readable, positions=name)


def test_positions_may_be_chosen_in_some_windows_only(readable: Entropies) -> None:
    config = DataConfig(min_context=MIN_CONTEXT, positions="every")
    windows_M = np.array([1, 4, 6], np.uint32)
    [index] = index_positions(config, readable, RECORD_NUMBERS, windows_M)
    [whole] = index_positions(config, readable, RECORD_NUMBERS)
    expected = [p for p in whole if p.window in windows_M]
    assert list(index) == expected
    assert list(whole.restrict_to(np.isin(np.arange(len(RECORD_NUMBERS)), windows_M))) == expected
    assert index[-1] == expected[-1]


class EverySecondToken:
    """A rule that shares no code with the built-in ones."""

    def entropy(self, record: tuple[np.ndarray, ...]) -> np.ndarray:
        return record[1]

    def positions(self, record_number: int, entropy_S: np.ndarray) -> np.ndarray:
        return np.arange(record_number % 2, len(entropy_S), 2)


def test_a_registered_choice_may_return_custom_rules(
    readable: Entropies, entropies: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry("data.positions", "rpt_jax.prompts.positions", PositionRequirements)
    monkeypatch.setattr(positions, "POSITION_CHOICES", registry)
    lengths_seen = []

    @registry.register("every_second_then_all")
    def every_second_then_all(config: DataConfig, read_entropies: EntropyReader) -> list[PositionRule]:
        lengths_seen.extend(len(entropy_S) for entropy_S in read_entropies())
        return [EverySecondToken(), every_position(config)]

    config = DataConfig(min_context=MIN_CONTEXT, positions="every_second_then_all")
    first, second = index_positions(config, readable, RECORD_NUMBERS)
    plain = [plain_S for _, plain_S in readable.read(RECORD_NUMBERS.tolist())]
    assert list(through_a_pipe(first)) == [
        Position(window, i, float(plain[window][i]))
        for window, number in enumerate(RECORD_NUMBERS)
        for i in range(number % 2, len(plain[window]), 2)
    ]
    assert [{(p.window, p.position) for p in second}] == [entropies.keys()]
    assert lengths_seen == [max(0, len(entropy_S) - MIN_CONTEXT) for entropy_S in plain]


@given(
    st.lists(arrays(np.float32, st.integers(0, 9), elements=st.floats(-2, 8, width=32)), max_size=5),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
@example([np.array([-0.0, 1.0, 0.0, -0.0], np.float32), np.array([-1e-7, -1.0], np.float32)], [0.1, 0.2, 0.4, 0.9])
@settings(deadline=None, max_examples=60)
def test_quantiles_are_exact(blocks: list[np.ndarray], fractions: list[float]) -> None:
    """Also with negative zeros and values just below zero, which rounding makes of an entropy of 0."""
    values = np.sort(np.concatenate([np.zeros(0, np.float32), *blocks]))
    values = values[values > -0.5]
    found = quantiles(lambda: blocks, fractions, -0.5)
    for fraction, value in zip(fractions, found, strict=True):
        rank = max(1, int(np.ceil(fraction * len(values))))
        assert value == (values[rank - 1] if len(values) else 0.0)
