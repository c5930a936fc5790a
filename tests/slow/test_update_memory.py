"""Memory of an update of the 14B policy, as the compiler reports it: no array grows with vocabulary times tokens."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from rpt_jax.config import ObjectiveConfig
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.gradient import policy_gradient

P, G, S = 2, 2, 2048


def temporary_bytes(vocab: int, response: int) -> int:
    """Return the temporary bytes of a gradient with two layers on one device. The program is compiled and not run."""
    shape = dataclasses.replace(preset("qwen2.5-14b"), layers=2, vocab=vocab)
    policy = Transformer(shape, jnp.bfloat16, remat="full", attention="blockwise")
    row = S + G * response
    limits = UpdateLimits(
        minibatches=1, rows=1, microbatch_tokens=row, logit_chunk_tokens=512, temperature=0.8, max_new_tokens=response
    )
    one = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), one, one)["params"]))

    def array(dtype: str, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    tokens = (P, G, response)
    batch = UpdateBatch(
        prompts_PxS=array("int32", P, S),
        lengths_P=array("int32", P),
        window_P=array("int32", P),
        tokens_PxGxT=array("int32", *tokens),
        mask_PxGxT=array("bool", *tokens),
        sampler_logprobs_PxGxT=array("float32", *tokens),
        advantages_PxG=array("float32", P, G),
        counted_P=array("bool", P),
    )
    gradient = jax.jit(policy_gradient, static_argnums=(0, 1, 2))
    compiled = gradient.lower(policy, ObjectiveConfig(), limits, params, batch, None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_vocabulary_times_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """Doubling vocabulary and tokens adds no more memory than the sum of doubling each, far less than logits would take."""
    vocabs, responses = (152_064, 2 * 152_064), (2048, 4096)
    found = {both: temporary_bytes(*both) for both in itertools.product(vocabs, responses)}
    with capsys.disabled():
        for (vocab, response), size in found.items():
            print(f"\nvocabulary {vocab:,}, rows of {S + G * response:,} tokens: {size / 2**30:.2f} GiB", end="")
    (small, longer), (larger, both) = ([found[v, r] for r in responses] for v in vocabs)
    logits = 4 * (vocabs[1] - vocabs[0]) * G * (responses[1] - responses[0])
    # It may add less: with the smaller vocabulary the layers need most memory, with the larger one the head does.
    assert both - larger - longer + small < 0.01 * logits
    assert longer > small and larger > small, "the compiler reports no memory"
