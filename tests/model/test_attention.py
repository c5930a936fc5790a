"""Every implementation of attention against the plain one, and the plain one against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rpt_jax.errors import UserError
from rpt_jax.model.attention import dispatch as attention
from rpt_jax.model.attention.dispatch import Context, KeyValues, attend, choose_attention
from rpt_jax.model.attention.kernels import attend_cudnn, attend_splash
from rpt_jax.model.transformer import prefill, segment_starts
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import SHALLOW, random_params

N, K, G, R, Q, S, C = 2, 2, 3, 2, 10, 9, 6
RNG = np.random.default_rng(0)


def draw(*dims: int) -> np.ndarray:
    return RNG.standard_normal(dims).astype(np.float32)


QUERIES = draw(N, K, G, R, Q, C)
SHARED = KeyValues(draw(N, K, 1, S, C), draw(N, K, 1, S, C))
OWN = KeyValues(draw(N, K, G, Q, C), draw(N, K, G, Q, C))
SEGMENTS = np.repeat([[[1, 2, 3]]], [3, 5, 2], axis=2)
# A prompt of some length, a prefix for every query, a window, nothing at all; tokens of one sequence, and of several.
PROMPT = Context(SHARED, end_NxGxQ=np.array([4, 9])[:, None, None])
PREFIXES = Context(SHARED, end_NxGxQ=RNG.integers(0, S + 1, (N, G, Q)))
WINDOW = Context(SHARED, np.minimum(np.arange(Q), S - 1)[None, None], np.minimum(np.arange(Q) + 3, S)[None, None])
NOTHING = Context(SHARED, end_NxGxQ=np.zeros((1, 1, 1), int))
CAUSAL = Context(OWN)
PACKED = Context(OWN, begin_NxGxQ=np.asarray(segment_starts(jnp.asarray(SEGMENTS))))
CASES = {
    "causal": [CAUSAL],
    "prompt and causal": [PROMPT, CAUSAL],
    "prefixes and packed": [PREFIXES, PACKED],
    "window, nothing and causal": [WINDOW, NOTHING, CAUSAL],
}


def seen(context: Context) -> np.ndarray:
    """Return what each query sees, bool [N, G, Q, S], from the words of `Context`."""
    begin = 0 if context.begin_NxGxQ is None else context.begin_NxGxQ[..., None]
    end = np.arange(1, Q + 1)[:, None] if context.end_NxGxQ is None else context.end_NxGxQ[..., None]
    keys = np.arange(context.kv.k.shape[3])
    return np.broadcast_to((begin <= keys) & (keys < end), (N, G, Q, len(keys)))


def with_gradients(fn, *arrays):
    """Return the output and the gradients of a random weighting of it."""
    weights = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)

    def loss(*arrays):
        out = fn(*arrays)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grads, out = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, *grads


def over(contexts, attend):
    """Return `attend` as a function of queries, keys and values, for `with_gradients`, and those arrays."""

    def fn(q, *kvs):
        pairs = [KeyValues(*pair) for pair in zip(kvs[::2], kvs[1::2], strict=True)]
        return attend(q, [context._replace(kv=kv) for context, kv in zip(contexts, pairs, strict=True)])

    return fn, [QUERIES, *(x for context in contexts for x in context.kv)]


def assert_close(ours, expected, tolerance=2e-5):
    assert len(ours) == len(expected)
    for x, y in zip(ours, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance)


# --- the plain one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_attention_over_several_places_is_one_softmax(case):
    ours = attend(QUERIES, CASES[case])
    assert ours.shape == QUERIES.shape
    for n, k, g, r in np.ndindex(QUERIES.shape[:4]):
        kvs = [[x[n, k, g % x.shape[2]] for x in context.kv] for context in CASES[case]]
        keys, values = (np.concatenate(x) for x in zip(*kvs, strict=True))
        mask = np.concatenate([seen(context)[n, g] for context in CASES[case]], axis=1)
        weights = reference.softmax(np.where(mask, QUERIES[n, k, g, r] @ keys.T / np.sqrt(C), -np.inf))
        np.testing.assert_allclose(ours[n, k, g, r], weights @ values, atol=1e-5)


def test_segments_begin_where_the_number_changes():
    np.testing.assert_array_equal(PACKED.begin_NxGxQ[0, 0], [0, 0, 0, 3, 3, 3, 3, 3, 8, 8])


# --- blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 9])
@pytest.mark.parametrize("case", CASES)
def test_blockwise_equals_the_reference(monkeypatch, case, block):
    """Blocks that neither length is a multiple of, and one block for all keys but not for all queries."""
    monkeypatch.setattr(attention, "_DENSE_PAIRS", 0)
    monkeypatch.setattr(attention, "_BLOCK", {"cpu": block})
    fn, arrays = over(CASES[case], functools.partial(attend, attention="blockwise"))
    plain, _ = over(CASES[case], attend)
    assert_close(with_gradients(fn, *arrays), with_gradients(plain, *arrays))


def test_blockwise_in_bfloat16_is_as_near_as_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "_DENSE_PAIRS", 0)
    monkeypatch.setattr(attention, "_BLOCK", {"cpu": 4})
    fn, arrays = over(CASES["prompt and causal"], functools.partial(attend, attention="blockwise"))
    plain, _ = over(CASES["prompt and causal"], attend)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    ours = with_gradients(fn, *rounded)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    assert_close(ours, with_gradients(plain, *rounded), tolerance=0.05)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_hidden_keys_count_for_nothing(monkeypatch, name):
    """A place without one visible key, keys far larger than the visible ones, and the order of the places."""
    monkeypatch.setattr(attention, "_DENSE_PAIRS", 0)
    monkeypatch.setattr(attention, "_BLOCK", {"cpu": 4})
    huge = NOTHING._replace(kv=KeyValues(SHARED.k * 1e4, SHARED.v * 1e4))
    cases = [CAUSAL], [NOTHING, CAUSAL], [CAUSAL, huge], [CAUSAL, PROMPT], [PROMPT, CAUSAL]
    expected, *hidden, last, first = jax.jit(lambda q: [attend(q, contexts, name) for contexts in cases])(QUERIES)
    for out in hidden:
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(last, first, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_attention_of_large_scores_stays_finite(monkeypatch, name):
    monkeypatch.setattr(attention, "_DENSE_PAIRS", 0)
    monkeypatch.setattr(attention, "_BLOCK", {"cpu": 4})
    fn, arrays = over([PROMPT, CAUSAL], functools.partial(attend, attention=name))
    assert all(np.isfinite(x).all() for x in with_gradients(fn, arrays[0] * 1e4, *arrays[1:]))


def temporary_bytes(name: str, length: int) -> int:
    """Bytes that XLA sets aside for the gradient of causal attention with `length` tokens, beside inputs and outputs."""
    array = jax.ShapeDtypeStruct((1, 1, 1, 1, length, 8), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 1, 1, length, 8), jnp.float32)

    def loss(q, k, v):
        return attend(q, [Context(KeyValues(k, v))], name).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, keys, keys).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_blocks_grows_with_the_length_and_not_with_its_square():
    blocks, plain = ({n: temporary_bytes(name, n) for n in (1024, 4096)} for name in ("blockwise", "reference"))
    assert plain[4096] > 10 * plain[1024] > 0
    assert blocks[4096] < 4.1 * blocks[1024]
    assert blocks[4096] < plain[4096] / 50


def test_attention_in_blocks_is_run_again_only_where_all_is(monkeypatch):
    """Its result is small, so "dots" keeps it. Counted in loops: a pass over the queries goes over their keys."""
    monkeypatch.setattr(attention, "_DENSE_PAIRS", 0)
    monkeypatch.setattr(attention, "_BLOCK", {"cpu": 4})
    params = jax.eval_shape(lambda: random_params(SHALLOW, 0))

    def loops(remat):
        policy = SHALLOW.clone(remat=remat, attention="blockwise")

        def loss(params):
            return prefill(policy, params, jnp.zeros((1, 9), jnp.int32), jnp.array([9]))[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text().count("stablehlo.while")

    assert loops("full") - 2 == loops("dots") == loops("none")


# --- kernels -----------------------------------------------------------------------------------------


def kernel_inputs(length: int, size: int, dtype=jnp.float32):
    rng = np.random.default_rng(2)
    return [
        jnp.asarray(rng.standard_normal(dims), dtype)
        for dims in ((2, 2, 1, 2, length, size), (2, 2, 1, length, size), (2, 2, 1, length, size))
    ]


def plain_causal(q, k, v):
    return attend(q, [Context(KeyValues(k, v))])


def test_splash_equals_the_reference():
    """A length that its blocks do not divide; the kernel is interpreted."""
    arrays = kernel_inputs(150, 64)
    ours = with_gradients(functools.partial(attend_splash, interpret=True), *arrays)
    assert_close(ours, with_gradients(plain_causal, *arrays), tolerance=1e-4)


def test_the_call_of_cudnn_means_the_reference():
    """JAX reads the same call without cuDNN: heads, branches and layout are right; the kernel is not run here."""
    q, k, v = kernel_inputs(10, 8)
    q, k, v = (jnp.concatenate([x, -x], axis=2) for x in (q, k, v))
    ours = with_gradients(functools.partial(attend_cudnn, implementation="xla"), q, k, v)
    assert_close(ours, with_gradients(plain_causal, q, k, v))


@pytest.mark.parametrize(
    ("name", "platform", "call"), [("splash", "tpu", "tpu_custom_call"), ("cudnn", "cuda", "cudnn$fmha")]
)
def test_kernels_lower_for_their_platform(monkeypatch, name, platform, call):
    """Forward and backward, as the compiler of that platform gets them; no hardware and no cuDNN is needed for that."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kernel_inputs(256, 64, jnp.bfloat16)]

    def loss(q, k, v):
        return attend(q, [Context(KeyValues(k, v))], name).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) >= 2


def test_blockwise_stands_in_where_kernels_do_not_apply():
    """Branches on a GPU or a TPU: no kernel, the same result."""
    contexts = [PROMPT, CAUSAL]
    for name in ("cudnn", "splash"):
        np.testing.assert_allclose(attend(QUERIES, contexts, name), attend(QUERIES, contexts), atol=1e-5)


# --- the choice --------------------------------------------------------------------------------------


def test_auto_is_the_best_that_runs():
    best = {
        ("cpu", "float32"): "blockwise",
        ("cpu", "bfloat16"): "blockwise",
        ("gpu", "bfloat16"): "cudnn",
        ("gpu", "float32"): "blockwise",
        ("tpu", "float32"): "splash",
        ("tpu", "bfloat16"): "splash",
    }
    for (platform, dtype), name in best.items():
        assert choose_attention("auto", platform, dtype) == name
        assert choose_attention(name, platform, dtype) == name
        assert choose_attention("reference", platform, dtype) == "reference"


@pytest.mark.parametrize(
    ("name", "platform", "dtype"),
    [("cudnn", "cpu", "bfloat16"), ("splash", "gpu", "bfloat16"), ("cudnn", "gpu", "float32")],
)
def test_kernels_are_refused_elsewhere(name, platform, dtype):
    with pytest.raises(
        UserError, match=f"policy.attention='{name}' is for a .*; here are a {platform} and .*'{dtype}'.*'auto'"
    ):
        choose_attention(name, platform, dtype)
