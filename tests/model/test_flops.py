"""FLOPs of a forward pass: by hand, and as XLA counts them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.model.flops import cache_flops, causal_pairs, forward_flops
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer, head
from tests.helpers.flops import token_flops
from tests.helpers.policy_reference import random_params

TINY = preset("tiny")


def test_a_forward_pass_is_the_sum_of_its_tokens():
    """Four tokens after ten earlier ones, two of which reach the head."""
    by_hand = sum(token_flops(TINY, keys, head=keys > 12) for keys in (11, 12, 13, 14))
    assert forward_flops(TINY, tokens=4, pairs=causal_pairs(4, 10), head_tokens=2) == by_hand


def test_the_last_layer_of_cached_tokens_computes_keys_and_values_only():
    by_hand = sum(token_flops(TINY, keys, head=False, only_cache=True) for keys in (1, 2, 3))
    assert cache_flops(TINY, tokens=3, pairs=causal_pairs(3)) == pytest.approx(by_hand, rel=1e-12)


def test_xla_counts_the_same():
    """XLA counts masked pairs too, and a little for norms and softmax. It counts a scanned layer once, so there is one."""
    policy = Transformer(dataclasses.replace(TINY, layers=1), attention="reference")
    tokens = 64

    def logits(params, tokens_1x1xS):
        hidden, _ = policy.apply({"params": params}, tokens_1x1xS, tokens_1x1xS)
        return hidden[0, 0] @ head(policy, params).matrix_VxD.T

    params = random_params(policy, 0)
    compiled = jax.jit(logits).lower(params, jax.ShapeDtypeStruct((1, 1, tokens), jnp.int32)).compile()
    ours = forward_flops(policy.config, tokens=tokens, pairs=tokens**2, head_tokens=tokens)
    assert ours < compiled.cost_analysis()["flops"] < 1.05 * ours
