"""Which positions a run trains on: by the proxy's entropies, and by those of the policy that is being trained."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.errors import UserError
from rpt_jax.infra.run_context import RunContext
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.selection import OwnEntropies, own_entropies, refresh_is_due, training_order, training_stream
from rpt_jax.setup import Setup, set_up
from tests.helpers.paths import TINY


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A mixture of two files, whose windows are of both lengths that are scored apart."""
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


def parts(setup: Setup, documents: np.ndarray) -> np.ndarray:
    corpus = setup.prepared.corpus
    return corpus.parts_D[corpus.documents_W[setup.train.numbers_N[documents]]]


def test_the_policy_scores_as_the_proxy_did(experiment: Experiment, setup: Setup) -> None:
    """The starting policy is the proxy here. What it is asked again it answers alike, and its prompts are of those documents."""
    with use_mesh(setup.mesh):
        own = own_entropies(experiment, setup, setup.params, step=6)
    assert sorted(parts(setup, own.documents_M)) == [0] * 4 + [1] * 4
    for number, record in own.records.items():
        assert number in setup.train.numbers_N[own.documents_M]
        for ours, theirs in zip(record, setup.prepared.scores[number], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert own.tokens == sum(len(entropy) for entropy, _ in own.records.values())
    order = training_order(experiment, setup, own)
    chosen = {order[i] for i in range(400)}
    assert {p.document for p in chosen} <= set(own.documents_M.tolist())
    every = np.sort(np.concatenate([record[0][experiment.data.min_context :] for record in own.records.values()]))
    assert min(p.entropy for p in chosen) > every[int(0.65 * len(every))]
    assert all(p.position >= experiment.data.min_context for p in chosen)


def test_refreshes_go_through_the_corpus(experiment: Experiment, setup: Setup) -> None:
    """Which documents is a function of the seed and of the refresh: all of a part have their turn before one has a second."""
    with use_mesh(setup.mesh):
        found = [own_entropies(experiment, setup, setup.params, step).documents_M for step in (6, 11, 16, 21)]
        again = own_entropies(experiment, setup, setup.params, 11).documents_M
        other = own_entropies(dataclasses.replace(experiment, seed=1), setup, setup.params, 6).documents_M
    assert np.array_equal(found[1], again) and not np.array_equal(found[0], other)
    windows = np.arange(len(setup.train))
    for part in (0, 1):
        mine, count = [f[parts(setup, f) == part] for f in found], int(np.sum(parts(setup, windows) == part))
        before_the_second = np.concatenate(mine[: count // 4])
        assert len(set(before_the_second.tolist())) == len(before_the_second) >= 4


def test_when_refreshes_are_due(experiment: Experiment) -> None:
    assert [step for step in range(1, 20) if refresh_is_due(experiment, step)] == [6, 11, 16]
    other = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, positions="threshold"))
    assert not any(refresh_is_due(other, step) for step in range(1, 20))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_renewed_stream_goes_on_alike_after_a_restore(experiment: Experiment, setup: Setup, workers: int) -> None:
    builder = PromptBuilder(experiment.prompt, setup.tokenizer)
    part_N = parts(setup, np.arange(len(setup.train)))
    documents = np.sort(np.concatenate([np.flatnonzero(part_N == part)[:4] for part in (0, 1)])).astype(np.uint32)
    entropies = {int(n): tuple(setup.prepared.scores[int(n)]) for n in setup.train.numbers_N[documents]}
    own = OwnEntropies(documents, entropies, 0)
    order = training_order(dataclasses.replace(experiment, seed=3), setup, own)
    stream = training_stream(experiment, setup, builder)
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    stream.renew(order)
    expected = [next(stream) for _ in range(6)]
    assert np.concatenate([batch.ids_P for batch in expected]).tolist() == list(range(12, 36))
    assert set(np.concatenate([batch.window_P for batch in expected])) <= set(documents)
    data = dataclasses.replace(experiment.data, workers=workers)
    again = training_stream(dataclasses.replace(experiment, data=data), setup, builder)
    again.set_state(state)
    again.renew(order)
    for theirs in expected:
        jax.tree.map(np.testing.assert_array_equal, next(again), theirs)
    assert again.get_state() == stream.get_state()


@pytest.mark.parametrize(
    ("positions", "field"),
    [
        ("threshold", "data.entropy_threshold=0.5"),
        ("curriculum", "data.entropy_threshold=0.5"),
        ("every", ""),
        ("random", "data.keep_fraction=0.3"),
        ("quantile", "data.keep_fraction=0.3"),
    ],
)
def test_too_few_positions_name_what_chose_them(
    experiment: Experiment, setup: Setup, capsys: pytest.CaptureFixture[str], positions: str, field: str
) -> None:
    data = dataclasses.replace(experiment.data, positions=positions)
    rule = ", ".join(filter(None, [f"chosen by data.positions='{positions}'", field]))
    training_order(dataclasses.replace(experiment, data=data), setup)
    assert rule + ", over the proxy's" in capsys.readouterr().out
    training = dataclasses.replace(experiment.training, prompts_per_step=10**6)
    with pytest.raises(UserError, match="training.prompts_per_step=1000000") as raised:
        training_order(dataclasses.replace(experiment, data=data, training=training), setup)
    assert rule + " and have data.min_context=16 tokens before them" in str(raised.value)
