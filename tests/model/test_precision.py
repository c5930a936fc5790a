"""The named precisions of matrix products, in the head and in every program that runs the policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import PolicyConfig
from rpt_jax.distributed.mesh import use_mesh
from rpt_jax.model.attention.kernels import attend_splash
from rpt_jax.model.precision import head_product, in_policy_precision
from rpt_jax.model.transformer import Transformer, head, in_compute_dtype
from rpt_jax.setup import make_policy
from tests.helpers.policy_reference import SHAPE, random_params
from tests.helpers.preflight import make_small_step

RNG = np.random.default_rng(0)
HIDDEN_MxD = RNG.standard_normal((5, 64)).astype(np.float32)
HEAD_VxD = RNG.standard_normal((11, 64)).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def test_a_bfloat16_head_rounds_its_operands_only():
    """Products are summed in float32; sums in bfloat16 would be off by 1e-2."""
    ours = head_product(jnp.asarray(HIDDEN_MxD), jnp.asarray(HEAD_VxD), "bfloat16")
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, rounded(HIDDEN_MxD) @ rounded(HEAD_VxD).T, atol=1e-5)
    exact = HIDDEN_MxD.astype(np.float64) @ HEAD_VxD.T
    assert np.abs(ours - exact).max() > 1e-3
    for precision in ("tensorfloat32", "float32"):
        np.testing.assert_allclose(head_product(HIDDEN_MxD, HEAD_VxD, precision), exact, atol=1e-4)


def test_the_gradient_of_a_bfloat16_head_is_that_of_rounded_operands():
    gradient_MxV = RNG.standard_normal((5, 11)).astype(np.float32)
    _, pull_back = jax.vjp(lambda x, w: head_product(x, w, "bfloat16"), jnp.asarray(HIDDEN_MxD), jnp.asarray(HEAD_VxD))
    of_hidden, of_head = pull_back(jnp.asarray(gradient_MxV))
    assert of_hidden.dtype == of_head.dtype == jnp.float32
    np.testing.assert_allclose(of_hidden, rounded(gradient_MxV) @ rounded(HEAD_VxD), atol=1e-5)
    np.testing.assert_allclose(of_head, rounded(gradient_MxV).T @ rounded(HIDDEN_MxD), atol=1e-5)


def test_decoding_keeps_a_bfloat16_head_in_bfloat16():
    """It is read for every token. The logits are those of the float32 matrix, which would be rounded for every token."""
    policy = Transformer(SHAPE, jnp.bfloat16, head_precision="bfloat16")
    params = random_params(policy, 0)
    ours, theirs = (head(policy, p) for p in (in_compute_dtype(policy, params), params))
    assert (ours.matrix_VxD.dtype, theirs.matrix_VxD.dtype) == (jnp.bfloat16, jnp.float32)
    hidden = jnp.asarray(HIDDEN_MxD[:, : SHAPE.width])
    a, b = (head_product(hidden, h.matrix_VxD, h.precision) for h in (ours, theirs))
    np.testing.assert_array_equal(a, b)
    for dtype, precision in ((jnp.float32, "bfloat16"), (jnp.bfloat16, "tensorfloat32")):
        other = Transformer(SHAPE, dtype, head_precision=precision)
        assert in_compute_dtype(other, params)["embedding"].dtype == jnp.float32


def test_every_program_computes_in_the_chosen_precision():
    """Sampler, trainer and scorer: forward, backward and recomputed products, of layers, attention and head."""
    small = make_small_step(
        "policy.dtype=float32",
        "policy.precision=float32",
        "policy.head_precision=float32",
        "policy.attention=blockwise",
        "objective.reward=info_gain",
    )
    with use_mesh(small.mesh):
        texts = {p.name: p.lower().as_text() for p in small.step.programs if p.name != "reward"}
    assert texts.keys() == {"score", "sample", "training reward", "update"}
    for program, text in texts.items():
        products = [line for line in text.splitlines() if "dot_general" in line and "f32" in line]
        others = [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line]
        assert products and not others, f"{program}: {others[:2]}"


def test_the_kernel_of_a_float32_policy_lowers_for_a_tpu():
    """Pallas refuses the precision of three bfloat16 products, forward and backward."""
    policy = Transformer(SHAPE, attention="tpu_kernels")

    @in_policy_precision
    def gradients(policy, *arrays):
        return jax.grad(lambda *arrays: attend_splash(*arrays).sum(), argnums=(0, 1, 2))(*arrays)

    keys = jax.ShapeDtypeStruct((1, 1, 1, 128, 64), jnp.float32)
    queries = jax.ShapeDtypeStruct((1, 1, 1, 2, 128, 64), jnp.float32)
    traced = jax.jit(gradients, static_argnums=0).trace(policy, queries, keys, keys)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "head"),
    [
        ("cpu", "cpu", "float32", "tensorfloat32"),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", "bfloat16"),
        ("TPU v5 lite", "tpu", "bfloat16", "bfloat16"),
    ],
)
def test_auto_is_bfloat16_on_accelerators_only(kind: str, platform: str, dtype: str, head: str):
    device = jax.sharding.AbstractDevice(kind, num_cores=1, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        policy = make_policy(PolicyConfig(), SHAPE)
        named = make_policy(PolicyConfig(dtype="float32", head_precision="float32"), SHAPE)
    assert (policy.dtype, policy.head_precision) == (jnp.dtype(dtype), head)
    assert (named.dtype, named.head_precision) == (jnp.float32, "float32")
