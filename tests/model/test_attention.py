"""Attention: the reference implementation against NumPy, and all others against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rpt_jax.config import PolicyConfig
from rpt_jax.errors import UserError
from rpt_jax.model.attention.blockwise import attend_blockwise
from rpt_jax.model.attention.dispatch import KERNELS, Context, KeyValues, as_key_block, attend, choose_attention
from rpt_jax.model.attention.kernels import attend_cudnn, attend_splash
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import prefill, segment_starts
from rpt_jax.setup import make_policy
from tests.helpers import policy_reference as reference
from tests.helpers.parameters import mostly_slow
from tests.helpers.policy_reference import SHALLOW, random_params

N, K, G, R, Q, S, C = 2, 2, 3, 2, 10, 9, 6
RNG = np.random.default_rng(0)


def draw(*dims: int) -> np.ndarray:
    return RNG.standard_normal(dims).astype(np.float32)


QUERIES = draw(N, K, G, R, Q, C)
SHARED = KeyValues(draw(N, K, 1, S, C), draw(N, K, 1, S, C))
OWN = KeyValues(draw(N, K, G, Q, C), draw(N, K, G, Q, C))
SEGMENTS = np.repeat([[[1, 2, 3]]], [3, 5, 2], axis=2)
# Contexts: prompts of different lengths, a prefix per query, a sliding window, an empty range; causal, and packed segments.
PROMPT = Context(SHARED, end_NxGxQ=np.array([4, 9])[:, None, None])
PREFIXES = Context(SHARED, end_NxGxQ=RNG.integers(0, S + 1, (N, G, Q)))
WINDOW = Context(SHARED, np.minimum(np.arange(Q), S - 1)[None, None], np.minimum(np.arange(Q) + 3, S)[None, None])
EMPTY = Context(SHARED, end_NxGxQ=np.zeros((1, 1, 1), int))
CAUSAL = Context(OWN)
PACKED = Context(OWN, begin_NxGxQ=np.asarray(segment_starts(jnp.asarray(SEGMENTS))))
CASES = {
    "causal": [CAUSAL],
    "prompt and causal": [PROMPT, CAUSAL],
    "prefixes and packed": [PREFIXES, PACKED],
    "window, empty and causal": [WINDOW, EMPTY, CAUSAL],
}


def attended(context: Context) -> np.ndarray:
    """Return which keys each query attends to, bool [N, G, Q, S], as the docstring of `Context` defines it."""
    begin = 0 if context.begin_NxGxQ is None else context.begin_NxGxQ[..., None]
    end = np.arange(1, Q + 1)[:, None] if context.end_NxGxQ is None else context.end_NxGxQ[..., None]
    keys = np.arange(context.kv.k.shape[3])
    return np.broadcast_to((begin <= keys) & (keys < end), (N, G, Q, len(keys)))


def attend_in_blocks(q: jax.Array, contexts: Sequence[Context], block_size: int) -> jax.Array:
    """Compute blockwise attention with small blocks, for inputs for which `attend` would use dense attention."""
    key_blocks = tuple(as_key_block(context, q.shape[4]) for context in contexts)
    return attend_blockwise(q * q.shape[-1] ** -0.5, key_blocks, block_size)


IMPLEMENTATIONS = {"reference": attend, "blockwise": functools.partial(attend_in_blocks, block_size=4)}


def with_gradients(fn: Callable[..., Any], *arrays: Any) -> tuple[Any, ...]:
    """Return the output of `fn` and the gradients of its elements' sum with random weights."""
    weights = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)

    def loss(*arrays: Any) -> tuple[jax.Array, Any]:
        out = fn(*arrays)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grads, out = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, *grads


def as_function_of_arrays(
    contexts: Sequence[Context], attend: Callable[..., jax.Array]
) -> tuple[Callable[..., jax.Array], list[Any]]:
    """Return `attend` as a function of queries, keys and values, for `with_gradients`, and these arrays."""

    def fn(q: jax.Array, *kvs: jax.Array) -> jax.Array:
        pairs = [KeyValues(*pair) for pair in zip(kvs[::2], kvs[1::2], strict=True)]
        return attend(q, [context._replace(kv=kv) for context, kv in zip(contexts, pairs, strict=True)])

    return fn, [QUERIES, *(x for context in contexts for x in context.kv)]


def assert_close(ours: Sequence[Any], expected: Sequence[Any], tolerance: float = 2e-5) -> None:
    assert len(ours) == len(expected)
    for x, y in zip(ours, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance)


# --- the reference ---


@pytest.mark.parametrize("case", CASES)
def test_attention_over_several_contexts_is_one_softmax(case):
    ours = attend(QUERIES, CASES[case])
    assert ours.shape == QUERIES.shape
    for n, k, g, r in np.ndindex(QUERIES.shape[:4]):
        kvs = [[x[n, k, g % x.shape[2]] for x in context.kv] for context in CASES[case]]
        keys, values = (np.concatenate(x) for x in zip(*kvs, strict=True))
        mask = np.concatenate([attended(context)[n, g] for context in CASES[case]], axis=1)
        weights = reference.softmax(np.where(mask, QUERIES[n, k, g, r] @ keys.T / np.sqrt(C), -np.inf))
        np.testing.assert_allclose(ours[n, k, g, r], weights @ values, atol=1e-5)


def test_a_segment_begins_where_the_segment_number_changes():
    np.testing.assert_array_equal(PACKED.begin_NxGxQ[0, 0], [0, 0, 0, 3, 3, 3, 3, 3, 8, 8])


# --- blocks ---


@pytest.mark.parametrize("block_size", mostly_slow([4, 9], 4))
@pytest.mark.parametrize("case", CASES)
def test_blockwise_equals_the_reference(case, block_size):
    """Block sizes that divide neither length, and one that holds all keys but not all queries."""
    blockwise, arrays = as_function_of_arrays(CASES[case], functools.partial(attend_in_blocks, block_size=block_size))
    plain, _ = as_function_of_arrays(CASES[case], attend)
    assert_close(with_gradients(blockwise, *arrays), with_gradients(plain, *arrays))


def test_blockwise_equals_the_reference_above_the_limit_of_dense_attention():
    """Long enough that `attend` chooses blocks, with the platform's block size."""
    arrays = kernel_inputs(130, 8)
    blockwise = with_gradients(lambda q, k, v: attend(q, [Context(KeyValues(k, v))], "blockwise"), *arrays)
    assert_close(blockwise, with_gradients(plain_causal, *arrays))


def test_blockwise_in_bfloat16_is_close_to_the_reference():
    blockwise, arrays = as_function_of_arrays(CASES["prompt and causal"], IMPLEMENTATIONS["blockwise"])
    plain, _ = as_function_of_arrays(CASES["prompt and causal"], attend)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    ours = with_gradients(blockwise, *rounded)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    assert_close(ours, with_gradients(plain, *rounded), tolerance=0.05)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_keys_out_of_range_have_no_effect(name):
    """Neither an empty context, nor masked keys of large magnitude, nor the order of the contexts."""
    huge = EMPTY._replace(kv=KeyValues(SHARED.k * 1e4, SHARED.v * 1e4))
    cases = [CAUSAL], [EMPTY, CAUSAL], [CAUSAL, huge], [CAUSAL, PROMPT], [PROMPT, CAUSAL]
    run = jax.jit(lambda q: [IMPLEMENTATIONS[name](q, contexts) for contexts in cases])
    expected, *masked, last, first = run(QUERIES)
    for out in masked:
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(last, first, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_with_large_scores_is_finite(name):
    fn, arrays = as_function_of_arrays([PROMPT, CAUSAL], IMPLEMENTATIONS[name])
    assert all(np.isfinite(x).all() for x in with_gradients(fn, arrays[0] * 1e4, *arrays[1:]))


def temporary_bytes(name: str, length: int) -> int:
    """Return the bytes of temporary buffers that XLA allocates for the gradient of causal attention over `length` tokens."""
    array = jax.ShapeDtypeStruct((1, 1, 1, 1, length, 8), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 1, 1, length, 8), jnp.float32)

    def loss(q, k, v):
        return attend(q, [Context(KeyValues(k, v))], name).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, keys, keys).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_blockwise_attention_is_linear_in_the_length():
    blocks, plain = ({n: temporary_bytes(name, n) for n in (1024, 4096)} for name in ("blockwise", "reference"))
    assert plain[4096] > 10 * plain[1024] > 0
    assert blocks[4096] < 4.1 * blocks[1024]
    assert blocks[4096] < plain[4096] / 50


def test_only_full_remat_recomputes_blockwise_attention():
    """The result of attention is saved under "dots". A forward pass has two loops, over queries and over keys."""
    params = jax.eval_shape(lambda: random_params(SHALLOW, 0))

    def count_loops(remat: str) -> int:
        policy = SHALLOW.clone(remat=remat, attention="blockwise")

        def loss(params: Any) -> jax.Array:
            return prefill(policy, params, jnp.zeros((1, 130), jnp.int32), jnp.array([130]))[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text().count("stablehlo.while")

    assert count_loops("full") - 2 == count_loops("dots") == count_loops("none")


# --- kernels ---


def kernel_inputs(length: int, size: int, dtype=jnp.float32):
    rng = np.random.default_rng(2)
    return [
        jnp.asarray(rng.standard_normal(dims), dtype)
        for dims in ((2, 2, 1, 2, length, size), (2, 2, 1, length, size), (2, 2, 1, length, size))
    ]


def plain_causal(q, k, v):
    return attend(q, [Context(KeyValues(k, v))])


def test_splash_equals_the_reference():
    """In interpret mode, with a length that is not a multiple of its blocks."""
    arrays = kernel_inputs(150, 64)
    ours = with_gradients(functools.partial(attend_splash, interpret=True), *arrays)
    assert_close(ours, with_gradients(plain_causal, *arrays), tolerance=1e-4)


def test_the_arguments_for_cudnn_give_the_result_of_the_reference():
    """The same call with JAX's XLA implementation: checks heads, branches and layout, not the kernel itself."""
    q, k, v = kernel_inputs(10, 8)
    q, k, v = (jnp.concatenate([x, -x], axis=2) for x in (q, k, v))
    ours = with_gradients(functools.partial(attend_cudnn, implementation="xla"), q, k, v)
    assert_close(ours, with_gradients(plain_causal, q, k, v))


@pytest.mark.parametrize(
    ("name", "platform", "call"), [("tpu_kernels", "tpu", "tpu_custom_call"), ("gpu_kernels", "cuda", "cudnn$fmha")]
)
def test_kernels_lower_for_their_platform(monkeypatch, name, platform, call):
    """Forward and backward. Lowering needs neither the hardware nor cuDNN, apart from two checks of JAX."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kernel_inputs(256, 64, jnp.bfloat16)]

    def loss(q, k, v):
        return attend(q, [Context(KeyValues(k, v))], name).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) >= 2


def test_blockwise_replaces_the_kernels_for_several_contexts():
    contexts = [PROMPT, CAUSAL]
    for name in KERNELS:
        np.testing.assert_allclose(attend(QUERIES, contexts, name), attend(QUERIES, contexts), atol=1e-5)


# --- choice of the implementation ---


def test_auto_chooses_the_kernels_of_the_platform():
    for platform, name in {"cpu": "blockwise", "gpu": "gpu_kernels", "tpu": "tpu_kernels"}.items():
        assert choose_attention("auto", platform) == name
        assert choose_attention(name, platform) == name
        assert choose_attention("reference", platform) == "reference"


def test_auto_is_plain_xla_on_a_chip_that_is_not_listed():
    for kind, name in {"NVIDIA H100 80GB HBM3": "gpu_kernels", "NVIDIA GeForce RTX 4080": "blockwise"}.items():
        device = jax.sharding.AbstractDevice(kind, num_cores=None, platform="gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
            assert make_policy(PolicyConfig(), preset("tiny")).attention == name
            assert make_policy(PolicyConfig(attention="gpu_kernels"), preset("tiny")).attention == "gpu_kernels"


def test_blockwise_replaces_a_kernel_that_does_not_compute_in_the_dtype():
    """cuDNN computes in bfloat16 only; here, without a GPU, it would fail."""
    arrays = kernel_inputs(130, 8)
    blockwise, ours = (
        attend(arrays[0], [Context(KeyValues(*arrays[1:]))], name) for name in ("blockwise", "gpu_kernels")
    )
    np.testing.assert_array_equal(ours, blockwise)


@pytest.mark.parametrize(("name", "platform"), [("gpu_kernels", "cpu"), ("tpu_kernels", "gpu"), ("gpu_kernels", "tpu")])
def test_the_kernels_of_another_platform_are_refused(name, platform):
    with pytest.raises(UserError) as raised:
        choose_attention(name, platform)
    assert raised.value.field == "policy.attention"
