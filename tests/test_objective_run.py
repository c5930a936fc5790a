"""Runs with the options that are off by default: each has an effect, and a killed run with all of them resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import MetricsWriter, read_metrics
from tests.helpers.runs import SMALL, comparable, experiment

SHORT = SMALL | {"training.total_steps": 3, "training.dynamic_sampling_from": 9, "evaluation.positions": 8}
# Everything that depends on more than the parameters: moving average, starting policy, documents, step.
EVERYTHING = SHORT | {
    "objective.reward": "info_gain",
    "objective.reference_tokens": 2,
    "objective.baseline_decay": 0.5,
    "objective.budget_weight": 0.25,
    "objective.budget_start": 16,
    "objective.budget_decay": 0.5,
    "objective.format_weight": 0.5,
    "objective.overlong_weight": 0.5,
    "objective.overlong_tokens": 8,
    "objective.advantage": "opo",
    "objective.loss": "cispo",
    "objective.aggregation": "sequence_mean",
    "objective.importance": "mask",
    "objective.kl": "k2",
    "objective.kl_weight": 0.1,
    "objective.entropy_weight": 0.01,
    "objective.document_weight": 0.5,
    "training.minibatches_per_step": 2,
    "optimizer.warmup_steps": 0,  # With warmup the first minibatch would change nothing.
    "checkpoint.every_steps": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("everything")
    main.run(experiment(**EVERYTHING), workdir)
    return workdir


def test_each_option_has_an_effect_on_the_metrics(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")[1:]
    names = ("policy/kl", "policy/entropy_exact", "importance/mean", "importance/rejected", "loss/document")
    assert all(name in line for line in lines for name in names)
    # The exact entropy is close to the estimate from the sampled tokens, and the documents are text that the policy knows.
    for line in lines:
        assert line["policy/entropy_exact"] == pytest.approx(line["policy/entropy"], rel=0.5)
        assert 0 < line["loss/document"] < 5 and line["importance/mean"] == pytest.approx(1, abs=1e-3)
    # In the second minibatch of the first step, the policy has already changed once.
    assert lines[0]["policy/kl"] > 0 and lines[-1]["policy/kl"] > lines[0]["policy/kl"]
    # Rewards other than 0 and 1.
    assert lines[0]["groups/zero_variance"] < 1 and not float(lines[0]["reward/mean"] * 32).is_integer()
    # The reward adds two passes over prompts and one over responses, and the update two more.
    assert lines[0]["flops/train_total"] > 1.3 * 8 * 0.9e6 * lines[0]["tokens/generated_total"]


def test_a_killed_run_with_all_options_resumes_to_the_same_metrics(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moving average is restored from the checkpoint, the starting policy from its files."""
    write = MetricsWriter.write

    def write_and_die(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
        write(self, step, scalars)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            main.run(experiment(**EVERYTHING), tmp_path)
    main.run(experiment(**EVERYTHING), tmp_path)
    assert comparable(tmp_path) == comparable(finished)


def test_a_reward_that_needs_an_end_of_thinking_token_is_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpt_jax import setup
    from rpt_jax.tokenizers.tokenizer import load_tokenizer

    def without_think(source):
        import dataclasses

        return dataclasses.replace(load_tokenizer(source), end_think_id=-1)

    monkeypatch.setattr(setup, "load_tokenizer", without_think)
    with pytest.raises(UserError) as raised:
        main.run(experiment(**SHORT | {"objective.reward": "mean_prob"}), tmp_path)
    assert raised.value.field == "objective.reward"
