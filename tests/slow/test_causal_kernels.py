"""Causal attention by kernels: cuDNN without transpositions; splash attention with several blocks, and compiled for TPUs."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.model.attention import kernels
from rpt_jax.model.attention.dispatch import Context, KeyValues, attend
from rpt_jax.model.attention.kernels import attend_splash
from rpt_jax.model.transformer import prefill
from tests.helpers.paths import ROOT
from tests.helpers.policy_reference import SHALLOW, random_params
from tests.helpers.processes import CHILD_SECONDS

pytestmark = pytest.mark.slow


def test_nothing_is_transposed_for_cudnn(monkeypatch):
    """Forward and backward: XLA removes the transpositions of a layer together with those of `attend_cudnn`.

    Callbacks stand in for cuDNN's kernels, because they too take and return arrays in one layout only.
    """

    def callback(*arrays: jax.Array, results: int) -> Any:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:results]]
        return jax.pure_callback(lambda *arrays: arrays[:results], shapes, *arrays)

    @jax.custom_vjp
    def stand_in(q, k, v):
        return callback(q, k, v, results=1)[0]

    stand_in.defvjp(lambda q, k, v: (stand_in(q, k, v), (q, k, v)), lambda qkv, out: callback(*qkv, out, results=3))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: stand_in(q, k, v))
    policy = SHALLOW.clone(attention="gpu_kernels", dtype=jnp.bfloat16)

    def loss(params: Any) -> jax.Array:
        tokens_NxS = jnp.zeros((2, 130), jnp.int32)
        return prefill(policy, params, tokens_NxS, jnp.array([130, 130]))[0].astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).lower(jax.eval_shape(lambda: random_params(SHALLOW, 0))).compile().as_text()
    assert text.count('custom_call_target="xla_ffi_python_cpu_callback"') == 2
    # Those of matrices belong to products.
    assert not re.findall(r"\[\d+(?:,\d+){2,}\]\S* transpose\(.*", text)


@pytest.mark.parametrize(
    ("blocks", "fused_blocks", "length"), [((256, 128), 8, 512), ((128,), 2, 384), ((256, 128), 8, 200)]
)
def test_splash_equals_the_reference_forward_and_backward(monkeypatch, blocks, fused_blocks, length):
    """In interpret mode: gradients by one kernel and by two, one block and several."""
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", {"float32": blocks})
    monkeypatch.setattr(kernels, "SPLASH_FUSED_BLOCKS", fused_blocks)
    rng = np.random.default_rng(length)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal(dims), jnp.float32)
        for dims in ((1, 2, 1, 3, length, 64), *[(1, 2, 1, length, 64)] * 2, (1, 2, 1, 3, length, 64))
    )

    def plain(q, k, v):
        return attend(q, [Context(KeyValues(k, v))])

    ours, expected = (
        jax.jit(jax.value_and_grad(lambda *qkv, fn=fn: jnp.sum(fn(*qkv) * weights), argnums=(0, 1, 2)))(q, k, v)
        for fn in (functools.partial(attend_splash, interpret=True), plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), ours, expected)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_splash_compiles_for_a_tpu(topology: str):
    """In both dtypes, for the head sizes of SmolLM2 and Qwen2.5. Two kernels, or three for many blocks of keys."""
    shapes = {
        "3x2048x64xbfloat16": 2,
        "5x2048x128xbfloat16": 2,
        "7x640x64xbfloat16": 2,
        "5x2048x128xfloat32": 2,
        "1x16384x128xbfloat16": 3,
    }
    child = [sys.executable, "-m", "tests.helpers.tpu_splash_child", topology, *shapes]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(child, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == shapes
