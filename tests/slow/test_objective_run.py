"""Runs with the options that are off by default: each has an effect."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.infra.metrics import read_metrics
from tests.helpers.runs import EVERYTHING, experiment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("everything")
    main.run(experiment(**EVERYTHING | {"profile.start": 2, "profile.steps": 1}), workdir)
    return workdir


def test_each_option_has_an_effect_on_the_metrics(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")[1:]
    names = ("policy/kl", "policy/entropy_exact", "importance/mean", "importance/rejected", "loss/document")
    assert all(name in line for line in lines for name in names)
    # The exact entropy is close to the estimate from the sampled tokens, and the policy predicts the documents better than the
    # uniform distribution over its 1,024 tokens does.
    for line in lines:
        assert line["policy/entropy_exact"] == pytest.approx(line["policy/entropy"], rel=0.5)
        assert 0 < line["loss/document"] < math.log(1024) and line["importance/mean"] == pytest.approx(1, abs=1e-3)
    # In the second minibatch of the first step, the policy has already changed once.
    assert lines[0]["policy/kl"] > 0 and lines[-1]["policy/kl"] > lines[0]["policy/kl"]
    # Rewards other than 0 and 1.
    assert lines[0]["groups/zero_variance"] < 1 and not float(lines[0]["reward/mean"] * 32).is_integer()
    # The reward adds two passes over prompts and one over responses, and the update two more.
    assert lines[0]["flops/train_total"] > 1.3 * 8 * 0.9e6 * lines[0]["tokens/generated_total"]


def test_a_profile_window_writes_a_trace(finished: Path) -> None:
    assert list((finished / "profile").rglob("*.xplane.pb"))
