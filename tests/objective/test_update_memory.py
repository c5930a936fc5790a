"""What an update of the 14B shape takes, by the compiler's own account: nothing that grows with vocabulary times tokens."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from rpt_jax.objective.batch import UpdateBatch, UpdateConfig
from rpt_jax.objective.gradient import policy_gradient
from rpt_jax.objective.loss import ClipRange

P, G, S = 2, 2, 2048


def temporary_bytes(vocab: int, response: int) -> int:
    """Beside arguments and results, of one gradient on one device, two of the layers; nothing is ever allocated."""
    shape = dataclasses.replace(preset("qwen2.5-14b"), layers=2, vocab=vocab)
    policy = Transformer(shape, jnp.bfloat16, remat="full", attention="blockwise")
    row = S + G * response
    config = UpdateConfig(1, rows=1, row_tokens=row, chunk=512, temperature=0.8, bounds=ClipRange(0.2, 0.2))
    one = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), one, one)["params"]))

    def of(dtype: str, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    tokens = (P, G, response)
    batch = UpdateBatch(
        of("int32", P, S),
        of("int32", P),
        of("int32", P),
        of("int32", *tokens),
        of("bool", *tokens),
        of("float32", *tokens),
        of("float32", P, G),
        of("bool", P),
    )
    gradient = jax.jit(policy_gradient, static_argnums=(0, 4))
    return gradient.lower(policy, params, batch, None, config).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_vocabulary_times_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the vocabulary, twice the tokens, both: what both take together beyond each alone is no row of logits."""
    vocabs, responses = (152_064, 2 * 152_064), (2048, 4096)
    found = {both: temporary_bytes(*both) for both in itertools.product(vocabs, responses)}
    with capsys.disabled():
        for (vocab, response), size in found.items():
            print(f"\nvocabulary {vocab:,}, rows of {S + G * response:,} tokens: {size / 2**30:.2f} GiB", end="")
    (small, longer), (larger, both) = ([found[v, r] for r in responses] for v in vocabs)
    logits = 4 * (vocabs[1] - vocabs[0]) * G * (responses[1] - responses[0])
    assert abs(both - larger - longer + small) < 0.01 * logits
    assert longer > small and larger > small, "the compiler says nothing"
