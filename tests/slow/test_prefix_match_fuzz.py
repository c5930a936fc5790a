"""The reward kernel against the reference implementation on a million generated responses."""

from __future__ import annotations

import pytest

from rpt_jax.config.schema import BOX_READINGS
from rpt_jax.rewards.prefix_match import Status
from tests.helpers.reward_fuzz import VOCABULARIES, Vocabulary, count_agreeing, make_vocabulary


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return make_vocabulary(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("reading", BOX_READINGS)
def test_kernel_equals_the_reference_on_a_million_responses(
    vocab: Vocabulary, reading: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = sum(count_agreeing(vocab, seed, prompts=1250, reading=reading) for seed in range(100, 200))
    with capsys.disabled():
        by_status = ", ".join(f"{status.name.lower()} {int(counts[status]):,}" for status in Status)
        print(f"\n{request.node.callspec.params['vocab']}, {reading}: {counts.sum():,} responses agree ({by_status})")
    assert counts.sum() == 1_000_000
