"""The benches of rollouts and of updates."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from rpt_jax.bench import __main__ as bench
from rpt_jax.bench import update
from rpt_jax.bench.options import chosen_model
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Transformer
from rpt_jax.weights.hf import save_policy
from tests.helpers.benches import MODEL, UPDATE, run_bench
from tests.helpers.policy_reference import random_params

pytestmark = pytest.mark.slow


def test_update_counts_prompts_once_or_once_per_sample(tmp_path: Path):
    shared, alone, _ = run_bench(tmp_path, "update", *MODEL, *UPDATE, "--repeats=1")
    # By hand: matrices 1536 in the trunk and 512 in the head; causal attention of 8 prompt and 4 response tokens.
    for row, prompts in ((shared, 1), (alone, 2)):
        tokens, pairs = 8 * prompts + 2 * 4, 36 * prompts + 2 * (4 * 8 + 10)
        flops = 2 * (6 * (1536 * tokens + 512 * 2 * 4) + 3 * 4 * 2 * 8 * pairs)
        assert row["GFLOP/s"] * row["seconds"] == pytest.approx(flops / 1e9, rel=0.01)
        assert row["response tokens/s"] * row["seconds"] == pytest.approx(16, rel=0.01)


def test_rollout_measures_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, ffn=16, vocab=32)
    params = random_params(Transformer(config), 0)
    save_policy(tmp_path / "model", config, params, {}, "")
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(0, 32, (4, 12)).astype(np.int32), np.array([12, 9, 12, 5], np.int32)
    np.savez(tmp_path / "prompts.npz", prompts=prompts, lengths=lengths)
    options = ["--samples=4", "--max-new-tokens=24", "--stop-ids=2,8", "--repeats=1", "--decode-slots=6"]
    arguments = ["rollout", f"--model={tmp_path / 'model'}", *options]
    (figures,) = run_bench(tmp_path, *arguments, f"--prompts={tmp_path / 'prompts.npz'}")
    assert figures["tokens_per_second"] == pytest.approx(figures["generated_tokens"] / figures["seconds"], rel=0.01)
    assert figures["slots"] == 6
    assert 0.5 < figures["occupancy"] <= 1
    assert figures["decode_seconds"] > 0
    random = ["--random-prompts=3", "--prompt-tokens=5", "--shared-tokens=2"]
    (figures,) = run_bench(tmp_path, *arguments[:-1], "--decode-slots=8", *random)
    assert figures["slots"] == 8 and figures["generated_tokens"] > 0
    assert bench.main(["bench", *arguments, "--prompt-tokens=5", "--shared-tokens=6"]) == 2
    assert "--shared-tokens=6" in capsys.readouterr().err
    np.savez(tmp_path / "bad.npz", prompts=prompts, lengths=lengths + 100)
    assert bench.main(["bench", *arguments, f"--prompts={tmp_path / 'bad.npz'}"]) == 2
    assert "bad.npz" in capsys.readouterr().err


def update_options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    update.add_options(parser)
    return parser.parse_args([*MODEL, *UPDATE, *arguments])


def test_an_update_with_repeated_prompts_has_the_same_gradient():
    options = update_options()
    config = chosen_model(options)
    batch = update.make_batch(options, config)
    shared, alone = (float(update.update_call(options, config, b)()) for b in (batch, update.unshared(batch)))
    assert shared == pytest.approx(alone, rel=1e-5)
