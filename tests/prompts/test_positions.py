"""Choices of positions, and the index over the positions of a corpus."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rpt_jax.config import DataConfig
from rpt_jax.corpus.entropy import Scores
from rpt_jax.corpus.store import Records, ShardWriter
from rpt_jax.prompts import positions
from rpt_jax.prompts.positions import (
    CURRICULUM_STAGES,
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
def entropies(scores: Records) -> dict[tuple[int, int], float]:
    """The entropy of every position that may be chosen."""
    return {
        (window, i): float(entropy)
        for window, number in enumerate(RECORD_NUMBERS)
        for i, entropy in enumerate(scores[int(number)][0])
        if i >= MIN_CONTEXT and entropy >= 0
    }


def through_a_pipe(value: Any) -> Any:
    """Return what a worker process receives; small values only, because the pipe has to hold them."""
    sender, receiver = multiprocessing.Pipe()
    with sender, receiver:
        sender.send(value)
        return receiver.recv()


def choose(scores: Records | Mapping, **fields: object) -> list[set[tuple[int, int]]]:
    """Return the chosen (window, position)s of every stage, read from a pickled index."""
    config = dataclasses.replace(DataConfig(min_context=MIN_CONTEXT), **fields)
    stages = []
    for index in index_positions(config, scores, RECORD_NUMBERS):
        chosen = list(through_a_pipe(index))
        assert chosen == sorted(chosen)
        assert len(chosen) == len(set(chosen)) == len(index)
        for p in chosen:
            entropy_S = scores[int(RECORD_NUMBERS[p.window])][0 if config.entropy_renormalized else 1]
            assert p.position >= MIN_CONTEXT
            assert p.entropy == entropy_S[p.position] >= 0
        stages.append({(p.window, p.position) for p in chosen})
    return stages


def test_evaluation_positions_are_above_the_threshold_and_have_context() -> None:
    entropies = ([9, 9, 0.5, 0.6, 2], [9], [9, 9, 9, 0.1])
    scores = [
        Scores(
            entropy_S=np.array(entropy, np.float32),
            top1_correct_S=np.zeros(len(entropy), bool),
            partial_entropy_S=np.zeros(len(entropy)),
        )
        for entropy in entropies
    ]
    chosen = choose_positions(scores, threshold=0.5, min_context=2)
    assert [(p.window, p.position) for p in chosen] == [(0, 3), (0, 4), (2, 2)]
    np.testing.assert_allclose([p.entropy for p in chosen], [0.6, 2, 9], rtol=1e-6)
    assert choose_positions(scores, threshold=10, min_context=0) == []


def test_every_chooses_all_positions_with_context_except_special_tokens(scores: Records, entropies: dict) -> None:
    assert choose(scores, positions="every") == [entropies.keys()]


def test_threshold_chooses_positions_above_it(scores: Records, entropies: dict) -> None:
    expected = {position for position, entropy in entropies.items() if entropy > 0.7}
    assert choose(scores, entropy_threshold=0.7) == [expected]
    assert choose(scores, entropy_threshold=0.35, entropy_renormalized=False) == [expected]


def test_quantile_chooses_the_hardest_fraction(scores: Records, entropies: dict) -> None:
    [hardest] = choose(scores, positions="quantile", keep_fraction=0.3)
    assert hardest == set(sorted(entropies, key=entropies.__getitem__)[-len(hardest) :])
    assert abs(len(hardest) - 0.3 * len(entropies)) <= 1


def test_random_chooses_a_fraction_that_depends_on_the_seed_alone(scores: Records, entropies: dict) -> None:
    [chosen] = choose(scores, positions="random", keep_fraction=0.3)
    assert chosen < entropies.keys()
    assert 0.15 < len(chosen) / len(entropies) < 0.45
    assert [chosen] != choose(scores, positions="quantile", keep_fraction=0.3)
    assert [chosen] == choose(scores, positions="random", keep_fraction=0.3)
    assert [chosen] != choose(scores, positions="random", keep_fraction=0.3, seed=1)


def test_the_curriculum_splits_the_threshold_choice_from_easy_to_hard(scores: Records, entropies: dict) -> None:
    stages = choose(scores, positions="curriculum", entropy_threshold=0.7)
    assert len(stages) == CURRICULUM_STAGES
    assert [set().union(*stages)] == choose(scores, entropy_threshold=0.7)
    for easy, hard in zip(stages, stages[1:], strict=False):
        assert max(map(entropies.__getitem__, easy)) < min(map(entropies.__getitem__, hard))
        assert abs(len(easy) - len(hard)) <= 2


def test_entropies_may_also_be_given_in_memory(scores: Records) -> None:
    in_memory = {int(number): scores[int(number)] for number in RECORD_NUMBERS}
    for name in ("threshold", "quantile", "curriculum"):
        assert choose(in_memory, positions=name) == choose(scores, positions=name)


def test_positions_may_be_chosen_in_some_windows_only(scores: Records) -> None:
    config = DataConfig(min_context=MIN_CONTEXT, positions="every")
    windows_M = np.array([1, 4, 6], np.uint32)
    [index] = index_positions(config, scores, RECORD_NUMBERS, windows_M)
    [whole] = index_positions(config, scores, RECORD_NUMBERS)
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
    scores: Records, entropies: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry("data.positions", "rpt_jax.prompts.positions", PositionRequirements)
    monkeypatch.setattr(positions, "POSITION_CHOICES", registry)
    lengths_seen = []

    @registry.register("every_second_then_all")
    def every_second_then_all(config: DataConfig, read_entropies: EntropyReader) -> list[PositionRule]:
        lengths_seen.extend(len(entropy_S) for entropy_S in read_entropies())
        return [EverySecondToken(), every_position(config)]

    config = DataConfig(min_context=MIN_CONTEXT, positions="every_second_then_all")
    first, second = index_positions(config, scores, RECORD_NUMBERS)
    plain = [scores[int(number)][1] for number in RECORD_NUMBERS]
    assert list(through_a_pipe(first)) == [
        Position(window, i, float(plain[window][i]))
        for window, number in enumerate(RECORD_NUMBERS)
        for i in range(number % 2, len(plain[window]), 2)
    ]
    assert [{(p.window, p.position) for p in second}] == [entropies.keys()]
    assert lengths_seen == [max(0, len(entropy_S) - MIN_CONTEXT) for entropy_S in plain]


@given(
    st.lists(arrays(np.float32, st.integers(0, 9), elements=st.floats(0, 8, width=32)), max_size=5),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_quantiles_are_exact(blocks: list[np.ndarray], fractions: list[float]) -> None:
    values = np.sort(np.concatenate([np.zeros(0, np.float32), *blocks]))
    found = quantiles(lambda: blocks, fractions, -0.5)
    for fraction, value in zip(fractions, found, strict=True):
        rank = max(1, int(np.ceil(fraction * len(values))))
        assert value == (values[rank - 1] if len(values) else 0.0)
