"""The reward kernel against the reference implementation on generated responses, for several vocabularies."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.config.schema import BOX_READINGS
from tests.helpers.reward_cases import Case, encode, make_case, reference_status, score
from tests.helpers.reward_fuzz import (
    GROUP,
    TOKENS,
    VOCABULARIES,
    Vocabulary,
    count_agreeing,
    fuzz,
    make_vocabulary,
    merged,
    random_response,
    scores,
)


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return make_vocabulary(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("reading", BOX_READINGS)
def test_kernel_equals_the_reference(vocab: Vocabulary, reading: str) -> None:
    counts = sum(count_agreeing(vocab, seed, prompts=125, reading=reading) for seed in (0, 1))
    assert counts.sum() == 2_000
    assert counts.min() > 40, f"the generated responses hardly cover some outcome: {counts}"


def test_rewards_do_not_depend_on_the_order_of_rollouts(vocab: Vocabulary) -> None:
    rng = np.random.default_rng(2)
    case = fuzz(vocab, rng, 50)
    reward, status, _ = scores(vocab, case)
    p, g = rng.permutation(50), rng.permutation(GROUP)
    shuffled = Case(*[x[p][:, g] for x in case[:3]], *[x[p] for x in case[3:5]], case.continuations)
    np.testing.assert_array_equal(scores(vocab, shuffled)[1], status[p][:, g])
    np.testing.assert_array_equal(scores(vocab, shuffled)[0], reward[p][:, g])
    alone = Case(*[x[7:8, 3:4] for x in case[:3]], *[x[7:8] for x in case[3:5]], case.continuations)
    np.testing.assert_array_equal(scores(vocab, alone)[1], status[7:8, 3:4])


def test_rewards_do_not_depend_on_padding(vocab: Vocabulary) -> None:
    rng = np.random.default_rng(3)
    case = fuzz(vocab, rng, 50)
    wider = case._replace(
        tokens=np.concatenate([case.tokens, rng.choice(np.array(vocab.poison), (50, GROUP, 6))], axis=-1),
        reference=np.concatenate([case.reference, rng.integers(0, 256, (50, 4), np.uint8)], axis=-1),
        boundaries=np.concatenate([case.boundaries, np.zeros((50, 4), bool)], axis=-1),
    )
    live = np.arange(TOKENS) < case.lengths[..., None]
    repadded = case._replace(tokens=np.where(live, case.tokens, rng.choice(np.array(vocab.poison), case.tokens.shape)))
    for other in (wider, repadded):
        np.testing.assert_array_equal(scores(vocab, other)[1], scores(vocab, case)[1])


@pytest.mark.parametrize("prompts, group, size", [(1, 1, 1), (3, 5, 7)])
def test_rewards_at_odd_sizes(prompts: int, group: int, size: int) -> None:
    rng = np.random.default_rng(size)
    continuations = [[b"a", b" size", b"}"][: p + 1] for p in range(prompts)]
    ids = [[encode(merged(random_response(rng, c)), rng) for _ in range(group)] for c in continuations]
    case = make_case(ids, continuations, size, width=max(len(tokens) for group in ids for tokens in group))
    np.testing.assert_array_equal(score(case)[1], reference_status(case))
