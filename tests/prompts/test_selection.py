"""The positions that a run trains on: by the proxy's entropies, and by those of the policy during training."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.corpus.entropy import Scorer
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.errors import UserError
from rpt_jax.infra.run_context import RunContext
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.pipeline import PromptStream
from rpt_jax.prompts.selection import (
    PolicyEntropies,
    rescoring_is_due,
    score_sample,
    training_orders,
    training_stage,
    training_stream,
)
from rpt_jax.prompts.targets import find_segments
from rpt_jax.setup import Setup, set_up
from tests.helpers.paths import TINY


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A mixture of two files, with windows of both lengths that are scored in batches of their own."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, count in (("a", 14), ("b", 7)):
        texts = [f"{name} {i}: " + " ".join(map(str, rng.integers(0, 99, rng.integers(4, 70)))) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {
        "source": "path",
        "path": f"0.5={folder}/a.jsonl,0.5={folder}/b.jsonl",
        "max_document_tokens": 128,
        "held_out_documents": 3,
        "positions": "self_entropy",
        "keep_fraction": 0.3,
        "rescore_every_steps": 5,
        "rescore_windows": 8,
    }
    training = {"prompts_per_step": 4, "logit_chunk_tokens": 1024}
    values = {"policy": {"path": str(TINY)}, "data": {"score_batch_windows": 4} | fields, "training": training}
    return from_config_dict(values)


@pytest.fixture(scope="module")
def setup(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with use_mesh(mesh):
        return set_up(experiment, mesh, tmp_path_factory.mktemp("run"), RunContext())


def mixture_parts(setup: Setup, windows: np.ndarray) -> np.ndarray:
    """Return the part of the mixture that each of the training windows belongs to."""
    corpus = setup.prepared.corpus
    return corpus.mixture_part_D[corpus.document_W[setup.train.numbers_N[windows]]]


def sample(experiment: Experiment, setup: Setup, step: int) -> PolicyEntropies:
    """Score a sample with the starting policy, which is the proxy here."""
    score = Scorer(setup.policy, setup.params, setup.tokenizer, setup.mesh, experiment).score
    with use_mesh(setup.mesh):
        return score_sample(experiment, setup.prepared, setup.train, score, step)


@pytest.mark.parametrize("step", [6, 11, 16])
def test_all_windows_are_scored_if_there_are_no_more_than_asked_for(
    experiment: Experiment, setup: Setup, step: int
) -> None:
    entropies = sample(with_data(experiment, rescore_windows=10_000), setup, step)
    assert len(entropies.windows_M) == len(setup.train)


def open_stream(experiment: Experiment, setup: Setup) -> PromptStream:
    builder = PromptBuilder(experiment.prompt, setup.tokenizer)
    return training_stream(experiment, setup.prepared, setup.train, setup.boxable_V, builder)


def with_data(experiment: Experiment, **fields: object) -> Experiment:
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **fields))


def test_a_policy_that_is_the_proxy_reproduces_the_stored_entropies(experiment: Experiment, setup: Setup) -> None:
    entropies = sample(experiment, setup, step=6)
    assert sorted(mixture_parts(setup, entropies.windows_M)) == [0] * 4 + [1] * 4
    assert [*entropies.records] == setup.train.numbers_N[entropies.windows_M].tolist()
    for number, record in entropies.records.items():
        for ours, stored in zip(record, setup.prepared.scores[number], strict=True):
            np.testing.assert_allclose(ours, stored, atol=1e-5)
    assert entropies.tokens == sum(len(entropy) for entropy, _ in entropies.records.values())


def test_positions_are_the_hardest_of_the_sampled_windows(experiment: Experiment, setup: Setup) -> None:
    entropies = sample(experiment, setup, step=6)
    min_context = experiment.data.min_context
    [order] = training_orders(experiment, setup.prepared, setup.train, setup.boxable_V, entropies)
    chosen = {order.positions[i] for i in range(400)}
    assert {p.window for p in chosen} <= set(entropies.windows_M.tolist())
    every = np.sort(np.concatenate([record[0][min_context:] for record in entropies.records.values()]))
    assert min(p.entropy for p in chosen) > every[int(0.65 * len(every))]
    assert all(p.position >= min_context for p in chosen)


def test_samples_are_a_function_of_seed_and_step(experiment: Experiment, setup: Setup) -> None:
    first = sample(experiment, setup, step=11).windows_M
    other_seed = dataclasses.replace(experiment, seed=1)
    assert np.array_equal(first, sample(experiment, setup, step=11).windows_M)
    assert not np.array_equal(first, sample(other_seed, setup, step=11).windows_M)
    assert not np.array_equal(first, sample(experiment, setup, step=6).windows_M)


def test_samples_visit_all_windows_of_a_part_before_any_is_repeated(experiment: Experiment, setup: Setup) -> None:
    samples = [sample(experiment, setup, step).windows_M for step in (6, 11, 16, 21)]
    part_W = mixture_parts(setup, np.arange(len(setup.train)))
    for part in (0, 1):
        of_part = [windows_M[mixture_parts(setup, windows_M) == part] for windows_M in samples]
        whole_samples = int(np.sum(part_W == part)) // 4
        first_visit = np.concatenate(of_part[:whole_samples])
        assert len(set(first_visit.tolist())) == len(first_visit) >= 4


def test_stages_of_training_last_equally_many_steps() -> None:
    assert [training_stage(step, 10, 4) for step in range(1, 11)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [training_stage(step, 1000, 1) for step in (1, 1000)] == [0, 0]
    assert training_stage(2, 2, 8) == 4


def test_positions_that_no_box_can_hold_are_left_out_and_counted(
    experiment: Experiment, setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    """Here a box holds half of the tokens."""
    boxable_V = np.arange(len(setup.boxable_V)) % 2 == 0
    with caplog.at_level(logging.INFO, logger="rpt_jax"):
        stream = training_stream(
            with_data(experiment, positions="every"),
            setup.prepared,
            setup.train,
            boxable_V,
            PromptBuilder(experiment.prompt, setup.tokenizer),
        )
    batches = [next(stream) for _ in range(50)]
    assert {int(i) % 2 for batch in batches for i in batch.reference_ids_PxR[:, 0]} == {0}
    left_out = sum(int((ids[experiment.data.min_context :] % 2 == 1).sum()) for ids in setup.train)
    assert f"{left_out:,} of {setup.prepared.corpus.token_count('train'):,} training positions" in caplog.text


def test_rescoring_is_due_after_every_interval_but_not_before_the_first_step(experiment: Experiment) -> None:
    assert [step for step in range(1, 20) if rescoring_is_due(experiment, step)] == [6, 11, 16]
    other = with_data(experiment, positions="threshold")
    assert not any(rescoring_is_due(other, step) for step in range(1, 20))


def test_policy_entropies_survive_a_checkpoint(experiment: Experiment, setup: Setup) -> None:
    entropies = sample(experiment, setup, step=6)
    restored = PolicyEntropies.from_state(json.loads(json.dumps(entropies.state())))
    np.testing.assert_array_equal(restored.windows_M, entropies.windows_M)
    assert restored.windows_M.dtype == entropies.windows_M.dtype
    assert restored.tokens == entropies.tokens
    assert restored.records.keys() == entropies.records.keys()
    for number, record in entropies.records.items():
        for ours, theirs in zip(restored.records[number], record, strict=True):
            np.testing.assert_array_equal(ours, theirs.astype(np.float32))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_a_switched_order_continues_after_a_restore(
    experiment: Experiment, setup: Setup, workers: int
) -> None:
    part_W = mixture_parts(setup, np.arange(len(setup.train)))
    windows_M = np.sort(np.concatenate([np.flatnonzero(part_W == part)[:4] for part in (0, 1)])).astype(np.uint32)
    records = {int(n): tuple(setup.prepared.scores[int(n)]) for n in setup.train.numbers_N[windows_M]}
    entropies = PolicyEntropies(windows_M=windows_M, records=records, tokens=0)
    other_seed = dataclasses.replace(experiment, seed=3)
    orders = training_orders(other_seed, setup.prepared, setup.train, setup.boxable_V, entropies)

    stream = open_stream(experiment, setup)
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    stream.switch_orders(orders)
    expected = [next(stream) for _ in range(6)]
    assert np.concatenate([batch.ids_P for batch in expected]).tolist() == list(range(12, 36))
    assert set(np.concatenate([batch.window_P for batch in expected])) <= set(windows_M)

    restored = open_stream(with_data(experiment, workers=workers), setup)
    restored.set_state(state)
    restored.switch_orders(orders)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(restored), batch)
    assert restored.get_state() == stream.get_state()


@pytest.mark.parametrize(
    ("positions", "field"),
    [
        ("threshold", "data.entropy_threshold=0.5"),
        ("curriculum", "data.entropy_threshold=0.5"),
        ("every", ""),
        ("random", "data.keep_fraction=0.3"),
        ("quantile", "data.keep_fraction=0.3"),
        ("self_entropy", "data.keep_fraction=0.3"),
    ],
)
def test_messages_about_positions_quote_the_fields_that_choose_them(
    experiment: Experiment, setup: Setup, caplog: pytest.LogCaptureFixture, positions: str, field: str
) -> None:
    chosen = with_data(experiment, positions=positions)
    quoted = ", ".join(filter(None, [f"data.positions='{positions}'", field]))
    with caplog.at_level(logging.INFO, logger="rpt_jax"):
        training_orders(chosen, setup.prepared, setup.train, setup.boxable_V)
    assert quoted + ", with the entropies of the proxy" in caplog.text
    training = dataclasses.replace(experiment.training, prompts_per_step=10**6)
    with pytest.raises(UserError, match=quoted) as raised:
        too_few = dataclasses.replace(chosen, training=training)
        training_orders(too_few, setup.prepared, setup.train, setup.boxable_V)
    assert raised.value.field == "data.path"


def test_the_part_of_a_mixture_with_too_few_positions_is_named(
    experiment: Experiment, setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    every = with_data(experiment, positions="every")
    part_W = mixture_parts(setup, np.arange(len(setup.train)))
    windows = [setup.train[i] for i in np.flatnonzero(part_W == 1)]
    positions = sum(int(setup.boxable_V[ids[experiment.data.min_context :]].sum()) for ids in windows)
    too_few = dataclasses.replace(
        every, training=dataclasses.replace(experiment.training, prompts_per_step=positions + 1)
    )
    with pytest.raises(UserError, match=rf"part '.*b\.jsonl' .* has only {positions:,} training positions") as raised:
        training_orders(too_few, setup.prepared, setup.train, setup.boxable_V)
    assert raised.value.field == "data.path"

    # Without weights, the parts are drawn from together.
    without_weights = with_data(too_few, path=experiment.data.path.replace("0.5=", ""))
    training_orders(without_weights, setup.prepared, setup.train, setup.boxable_V)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"b.jsonl' of the mixture has only {positions:,} training positions" in warning


def test_a_text_without_a_sentence_has_no_targets(experiment: Experiment, setup: Setup):
    """The texts are numbers, which no period ends."""
    sentences = with_data(experiment, targets="segment")
    segments = find_segments(sentences, setup.tokenizer)
    with pytest.raises(UserError, match=r"b\.jsonl.*data\.targets='segment'") as raised:
        training_orders(sentences, setup.prepared, setup.train, setup.boxable_V, segments=segments)
    assert raised.value.field == "data.targets"
