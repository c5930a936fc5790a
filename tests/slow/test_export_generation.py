"""Greedy responses of exported policies, by `transformers` and by the package, token for token."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rpt_jax.conversion import convert
from rpt_jax.model.transformer import Transformer
from rpt_jax.rollout.generate import generate
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_policy
from tests.helpers.generation import LIMIT, generate_with_transformers, write_stopping_policy
from tests.helpers.hf_models import SHAPE, write_gguf
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PROMPTS = np.random.default_rng(0).integers(0, 256, (12, 5)).astype(np.int32)


def write_source(kind: str, directory):
    """Write a policy of a kind; return its path."""
    if kind == "shipped":
        return ROOT / "configs" / "tiny"
    if kind == "gguf":
        # Without ids that have no token, which `transformers` would generate.
        config = dataclasses.replace(SHAPE, vocab=260)
        write_gguf(directory / "a.gguf", config=config, extra_keys={"tokenizer.ggml.eom_token_id": 257})
        return directory / "a.gguf"
    families = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
    return write_stopping_policy(directory / kind, **families[kind])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gguf", "shipped"])
def test_both_generate_the_same_greedy_responses(tmp_path, kind):
    convert(write_source(kind, tmp_path), tmp_path / "out")
    config, params, _ = load_policy(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    count, length = PROMPTS.shape
    ours = generate(
        Transformer(config, absent_ids=tokenizer.absent_ids(config.vocab)),
        params,
        PROMPTS,
        np.full(count, length, np.int32),
        np.arange(count),
        jax.random.key(0),
        samples=1,
        max_new_tokens=LIMIT,
        temperature=1e-5,
        stop_ids=tokenizer.stop_ids,
    )
    theirs = generate_with_transformers(tmp_path / "out", PROMPTS)
    for p, response in enumerate(theirs):
        assert response == np.asarray(ours.tokens_PxGxT[p, 0, : ours.lengths_PxG[p, 0]]).tolist()
    if kind in ("llama", "qwen2", "qwen3"):
        assert sum(len(response) < LIMIT for response in theirs) > 3, "the example tests too little"
