"""The rollout engine: settings for speed and memory do not change any sampled token."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.errors import UserError
from rpt_jax.model.attention.blocked_cache import BlockedCache
from rpt_jax.model.attention.dispatch import KeyValues, cache_kernel
from rpt_jax.model.transformer import Transformer, in_compute_dtype
from rpt_jax.rewards.boxed import read_box, start_parsers
from rpt_jax.rollout.engine import live_sizes
from rpt_jax.rollout.generate import generate, sample_rollouts
from rpt_jax.rollout.kv_cache import (
    CACHE_LAYOUTS,
    SharedCache,
    cached_attention,
    empty_ring,
    own_block_size,
    shared_reads,
    to_blocks,
    write_token,
)
from rpt_jax.rollout.memory import RolloutMemory, plan_slots, rollout_memory
from rpt_jax.rollout.prefix_sharing import Prompts, separate, share_prefixes
from rpt_jax.rollout.rollouts import Decoding, Ended, Rollouts
from rpt_jax.rollout.sampling import sample_tokens, truncate
from rpt_jax.tokenizers.tokenizer import ByteVocab
from tests.helpers import policy_reference as reference
from tests.helpers.parameters import mostly_slow
from tests.helpers.policy_reference import POLICY, SHALLOW, SHAPE, random_params
from tests.helpers.rollouts import STOPS, TEMPERATURE, assert_same, select

P, G, S, T = 8, 4, 24, 24
KEY = jax.random.key(5)
DECODING = Decoding(samples=G, max_new_tokens=T, temperature=TEMPERATURE, stop_ids=STOPS)


@pytest.fixture(scope="module")
def params():
    return random_params(POLICY, 0)


def nested(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return prompts at four positions of each of two documents, which end with the same three tokens; lengths; and ids."""
    rng = np.random.default_rng(seed)
    documents, template = rng.integers(0, SHAPE.vocab, (2, S)), rng.integers(0, SHAPE.vocab, 3)
    rows = [[*document[:n], *template] for document in documents for n in (12, 13, 17, 21)]
    lengths = np.array([len(row) for row in rows], np.int32)
    poison = rng.integers(0, SHAPE.vocab, (P, S))
    prompts = [[*row, *noise[len(row) :]] for row, noise in zip(rows, poison, strict=True)]
    return np.array(prompts, np.int32), lengths, np.array([3, 1, 4, 15, 9, 2, 6, 5], np.int32)


def run(
    params, policy: Transformer = POLICY, prompts: Prompts | None = None, vocab=None, **changes
) -> tuple[Rollouts, np.ndarray]:
    """Return the rollouts of `prompts`, by default of `nested` without sharing, and the decode steps at each batch size."""
    prompts = separate(*nested()) if prompts is None else prompts
    rollouts, work = sample_rollouts(policy, params, prompts, KEY, dataclasses.replace(DECODING, **changes), vocab)
    sizes = live_sizes(changes.get("slots", 0), len(prompts.ids_P) * G)
    assert int(work.slots[0]) == int(work.steps[0] @ np.array(sizes))
    return jax.device_get(rollouts), np.asarray(work.steps[0])


@pytest.fixture(scope="module")
def expected(params) -> Rollouts:
    """Return rollouts of every prompt in a separate batch, cut at the first stop token in NumPy."""
    endless = jax.tree.map(
        lambda *rows: np.concatenate(rows),
        *(run(params, prompts=separate(*(x[p : p + 1] for x in nested())), stop_ids=())[0] for p in range(P)),
    )
    stops = np.isin(endless.tokens_PxGxT, STOPS)
    lengths = np.where(stops.any(-1), stops.argmax(-1) + 1, T)
    mask = np.arange(T) < lengths[..., None]
    assert len(set(lengths.ravel().tolist())) > 6 and 1 < (lengths == T).sum() < P * G, "the example lacks some lengths"
    return Rollouts(
        tokens_PxGxT=endless.tokens_PxGxT * mask,
        lengths_PxG=lengths,
        logprobs_PxGxT=endless.logprobs_PxGxT * mask,
        ended_PxG=stops.any(-1).astype(np.int32),
    )


@pytest.mark.parametrize("slots", mostly_slow([1, 5, 0], 5))
def test_rollouts_do_not_depend_on_the_number_of_slots(params, expected, slots):
    """One slot decodes one rollout after the other, five are refilled and wrap around the ring, and all shrink in the end."""
    ours, steps = run(params, slots=slots)
    assert_same(ours, expected)
    decoded = expected.lengths_PxG.sum() - P * G
    assert len(steps) == (5 if slots == 0 else 1) and (steps > 0).sum() >= min(3, len(steps)), steps
    assert steps[0] == decoded if slots == 1 else decoded / (slots or P * G) <= steps.sum() < decoded


@pytest.mark.parametrize(("steps", "slots"), mostly_slow([(3, 1), (4, 5), (5, 0), (99, 7)], (4, 5)))
def test_rollouts_do_not_depend_on_how_often_ended_ones_are_found(params, expected, steps, slots):
    """With slots that are refilled, with batches that shrink, and with one check at the end of the longest response."""
    prompts = share_prefixes(*nested(), tail=3)
    ours, taken = run(params, prompts=prompts, slots=slots, steps_per_check=steps)
    assert_same(ours, expected)
    per_check = min(steps, T - 1)
    assert not (taken % per_check).any()
    # The steps until the end of a rollout is found are counted too.
    until_found = -(-(expected.lengths_PxG - 1) // per_check) * per_check
    assert taken.sum() == until_found.sum() if slots == 1 else taken.sum() >= until_found.sum() / (slots or P * G)


@pytest.mark.parametrize(("prefill_tokens", "tail"), mostly_slow([(7, 0), (30, 3), (512, 3)], (30, 3)))
def test_rollouts_do_not_depend_on_shared_prefixes_and_prefill_chunks(params, expected, prefill_tokens, tail):
    """Prefill processes a part of a root, one root, or all roots at once, with dynamic and with fixed shapes."""
    prompts = share_prefixes(*nested(), tail=tail)
    assert len(prompts.roots_NxS) == (8 if tail else 2) and prompts.tails_PxU.shape[1] == (3 if tail else 4)
    ours, _ = run(params, prompts=prompts, prefill_tokens=prefill_tokens, slots=7)
    assert_same(ours, expected)


def test_rollouts_do_not_depend_on_prompt_order_with_shared_prefixes(params, expected):
    order = np.random.default_rng(1).permutation(P)
    decoding = dataclasses.replace(DECODING, slots=5)
    ours = generate(POLICY, params, *(x[order] for x in nested()), KEY, **dataclasses.asdict(decoding))
    assert_same(jax.device_get(ours), select(expected, order))


def test_bfloat16_weights_give_the_same_rollouts_as_rounding_in_each_layer():
    """A layer rounds its matrices when it uses them, so rounding them once before sampling changes nothing."""
    policy, params = dataclasses.replace(SHALLOW, dtype=jnp.bfloat16), random_params(SHALLOW, 0)
    rounded = in_compute_dtype(policy, params)
    assert {str(x.dtype) for x in jax.tree.leaves(rounded["layers"])} == {"bfloat16", "float32"}
    assert rounded["embedding"].dtype == jnp.float32
    ours, theirs = (run(weights, policy, slots=5)[0] for weights in (rounded, params))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- shared prefixes ---

token_rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(token_rows, st.sampled_from([0, 1, 4]), st.sampled_from([1, 2, 3]))
def test_every_prompt_is_a_prefix_of_its_root_and_a_tail(rows, tail, parts):
    rows = rows * parts
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.full((len(rows), 30), 7, np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    prompts = share_prefixes(padded, lengths, np.arange(len(rows), dtype=np.int32), tail, parts)
    assert prompts.ids_P.tolist() == [*range(len(rows))] and prompts.lengths_P.tolist() == lengths.tolist()
    assert not tail or (prompts.roots_NxS.shape == padded.shape and prompts.tails_PxU.shape == (len(rows), tail))
    assert len(prompts.roots_NxS) % parts == 0 and prompts.tail_lengths_P.min() >= 1
    assert not tail or prompts.members_NxW is None
    if prompts.members_NxW is not None:
        each = prompts.members_NxW.reshape(parts, -1, prompts.members_NxW.shape[1])
        assert prompts.members_NxW.size <= 2 * len(rows) and len(prompts.members_NxW) == len(prompts.roots_NxS)
        for members_NxW, root_P in zip(each, prompts.root_P.reshape(parts, -1), strict=True):
            listed = [(n, p) for n, of_root in enumerate(members_NxW) for p in of_root if p < len(root_P)]
            assert sorted(listed) == sorted((n, p) for p, n in enumerate(root_P))
    root_P = np.arange(len(rows)) if prompts.root_P is None else prompts.root_P
    for part in range(parts if prompts.root_P is not None else 0):
        filled = prompts.lengths_N.reshape(parts, -1)[part] > 0
        assert not np.diff(filled.astype(int)).clip(0).any() or min(lengths) == 1, "rows without a root come last"
        root_P = root_P + np.where(np.arange(len(rows)) // (len(rows) // parts) == part, part * len(filled), 0)
    for p, (root, end) in enumerate(zip(root_P, prompts.ends_P, strict=True)):
        own = prompts.tails_PxU[p, : prompts.tail_lengths_P[p]]
        assert end <= prompts.lengths_N[root] and [*prompts.roots_NxS[root, :end], *own] == rows[p]


def test_positions_of_a_document_share_one_root():
    """This holds with other documents between them and in each part separately, and not for tails above the limit."""
    prompts, lengths, ids = nested()
    mixed = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    for tail, parts, expected in ((0, 1, [0, 1] * 4), (3, 1, [0, 1] * 4), (3, 2, [0, 1] * 4), (2, 1, [*range(8)])):
        found = share_prefixes(prompts[mixed], lengths[mixed], ids[mixed], tail, parts)
        assert len(set(found.root_P[:4])) == len(set(expected[:4])) and len(set(found.root_P)) == len(set(expected))
        assert (found.root_P[:-2] == found.root_P[2:]).all() == (tail != 2) and (found.tail_lengths_P >= 1).all()
    assert share_prefixes(*(x[::4] for x in nested())).root_P is None, (
        "without shared prefixes each prompt is its own root"
    )


# --- attention over caches ---

N, W, K, R, C, B, L = 3, 4, 2, 3, 8, 4, 2
M, RING = 6, 11
BLOCKWISE = cache_kernel("blockwise", "float32")


def cache_inputs(seed: int):
    rng = np.random.default_rng(seed)
    normal = lambda *dims: rng.standard_normal(dims).astype(np.float32)  # noqa: E731
    shared = KeyValues(normal(L, N, K, 1, S, C), normal(L, N, K, 1, S, C))
    own = KeyValues(normal(L, M, K, 1, RING, C), normal(L, M, K, 1, RING, C))
    return shared, own, normal(M, K, 1, R, 1, C), KeyValues(normal(M, K, 1, 1, C), normal(M, K, 1, 1, C))


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend_cached(block, order, shared, own, q, new, end_NxW, index_M, step, counts_M):
    """Write the ring token by token up to `step`, and attend in layer 1."""
    ring = empty_ring(shared, M, RING, block, order)

    def write(i, ring):
        token = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i % RING, 1, axis=4), own)
        return write_token(ring, token, i)

    ring = jax.lax.fori_loop(jnp.maximum(step - RING, 0), step, write, ring)
    blocks = to_blocks(shared, block, order)
    cache = SharedCache(blocks=blocks, end_NxW=end_NxW, index_R=jnp.arange(end_NxW.size))
    return cached_attention((shared_reads(cache, index_M, R, BLOCKWISE),), ring, step, counts_M, R, BLOCKWISE)(
        1, q, new
    )


@pytest.mark.parametrize(("block", "order"), [(B, "transposed_keys"), (S, "joined"), (B, "separate")])
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_cached_attention_equals_dense_attention(block, order, data):
    shared, own, q, new = cache_inputs(data.draw(st.integers(0, 9)))
    index = np.array(data.draw(st.permutations(range(N * W)))[:M], np.int32)
    idle = np.array(data.draw(st.lists(st.booleans(), min_size=M, max_size=M)))
    end_NxW = np.array(data.draw(st.lists(st.integers(1, S), min_size=N * W, max_size=N * W)), np.int32).reshape(N, W)
    step = data.draw(st.integers(0, 40))
    counts = np.array([data.draw(st.integers(0, min(step, RING))) for _ in range(M)], np.int32)
    ours = np.asarray(
        attend_cached(block, order, shared, own, q, new, end_NxW, np.where(idle, 2**30, index), step, counts)
    )
    for m in np.flatnonzero(~idle):
        end, last = end_NxW.reshape(-1)[index[m]], [i % RING for i in range(step - counts[m], step)]
        kv = [
            np.concatenate([a[1, index[m] // W, :, 0, :end], b[1, m, :, 0][:, last], c[m, :, 0]], axis=1)
            for a, b, c in zip(shared, own, new, strict=True)
        ]
        keys_KxSxC, values_KxSxC = kv
        shares = reference.softmax(np.einsum("krc,ksc->krs", q[m, :, 0, :, 0], keys_KxSxC) / math.sqrt(C))
        np.testing.assert_allclose(ours[m, :, 0, :, 0], np.einsum("krs,ksc->krc", shares, values_KxSxC), atol=1e-5)


def test_separate_rows_give_the_same_attention_as_shared_rows():
    shared, own, q, new = cache_inputs(0)
    index, end = np.array([11, 2, 5, 6, 0, 9], np.int32), np.arange(12, dtype=np.int32).reshape(N, W) + 3
    ring, counts = empty_ring(own, M, RING, B, "joined"), np.zeros(M, np.int32)
    blocks = to_blocks(shared, B, "joined")
    cache = SharedCache(blocks=blocks, end_NxW=end, index_R=jnp.arange(end.size))
    separate_rows = cache.unshare(index)
    assert separate_rows.end_NxW.shape == (M, 1)
    expected, ours = (
        cached_attention((shared_reads(*reads, R, BLOCKWISE),), ring, 0, counts, R, BLOCKWISE)(0, q, new)
        for reads in ((cache, index), (separate_rows, None))
    )
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_rows_that_move_to_the_front_keep_their_contents(data):
    rows = np.sort(data.draw(st.permutations(range(M)))[: data.draw(st.integers(1, M))]).astype(np.int32)
    k, v = np.random.default_rng(0).standard_normal((2, L, 2, M, K, B, C)).astype(np.float32)
    cache = BlockedCache.of(jnp.asarray(k), jnp.asarray(v), data.draw(st.sampled_from(["separate", "joined"])))
    moved = jax.jit(BlockedCache.move_to_front)(cache, rows)
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(after[:, :, : len(rows)], before[:, :, rows])


# --- truncation ---


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 50), st.floats(0.01, 1.0), st.integers(0, 10_000))
def test_truncation_equals_its_definition(top_k, top_p, seed):
    logits = np.random.default_rng(seed).permutation(48).astype(np.float32) / 8
    kept = np.asarray(truncate(jnp.asarray(logits)[None], top_k, top_p))[0] > -1e30
    order = np.argsort(-logits)[: top_k or None]
    shares = reference.softmax(logits[order].astype(np.float64))
    before = np.cumsum(shares) - shares
    if np.abs(before - top_p).min() > 1e-5:  # Otherwise the result depends on rounding.
        assert set(np.flatnonzero(kept)) == set(order[before < top_p])


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (9, 0.8)])
def test_truncated_samples_follow_the_renormalized_distribution(top_k, top_p):
    logits = np.random.default_rng(3).standard_normal(48).astype(np.float32)
    uniform = np.random.default_rng(4).random(8192, np.float32)
    left = truncate(jnp.broadcast_to(logits, (8192, 48)), top_k, top_p)
    counts = np.bincount(sample_tokens(left, uniform)[0], minlength=48)
    shares = np.where(np.asarray(left[0]) > -1e30, np.exp(logits.astype(np.float64)), 0)
    shares /= shares.sum()
    assert 3 < (shares > 0).sum() < 30 and not counts[shares == 0].any()
    assert scipy.stats.chisquare(counts[shares > 0], shares[shares > 0] * 8192).pvalue > 1e-3


def test_truncated_sampling_requires_an_importance_correction():
    for field in ({"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(UserError) as raised:
            from_config_dict({"rollout": field})
        assert raised.value.field == "objective.importance"
        from_config_dict({"rollout": field, "objective": {"importance": "truncate"}})
    assert Experiment().rollout.top_k == 0


# --- ends of responses ---

PIECES = [b"</think>", b"</th", b"ink>", b"\\boxed{", b"\\box", b"ed{", b"a", b"{", b"}", b"\\", b"}}", b"", b"x}y"]
MARKER = PIECES.index(b"")


def is_closed(tokens: list[int]) -> bool:
    """Return whether the last box of the answer is closed, from all bytes at once."""
    pieces = [PIECES[t] for t in tokens]
    ends = [sum(map(len, pieces[:i])) for i, t in enumerate(tokens) if t == MARKER]
    text = b"".join(pieces)
    at = text.rfind(b"</think>")
    ends += [at + 8] if at >= 0 else []
    if not ends:
        return False
    _, opening, content = text[max(ends) :].rpartition(b"\\boxed{")
    if not opening:
        return False
    depth, escaped = 1, False
    for i, byte in enumerate(content):
        if not escaped and byte in b"{}":
            depth += 1 if byte == b"{"[0] else -1
        if depth == 0:
            return (
                i > 0 or len(content) > 1
            )  # An empty box may continue with a second brace, which is then its content.
        escaped = byte == b"\\"[0] and not escaped
    return False


@functools.partial(jax.jit, static_argnames="bytes_per_check")
def append_tokens(parser, tokens_KxM, table, sizes, bytes_per_check):
    return read_box(parser, tokens_KxM, table, sizes, MARKER, bytes_per_check)


@pytest.mark.parametrize(("steps", "bytes_per_check"), [(1, 1), (7, 1), (7, 5)])
@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, len(PIECES) - 1), min_size=14, max_size=14), min_size=3, max_size=3))
def test_box_parser_agrees_with_reading_all_bytes_at_once(steps, bytes_per_check, rows):
    """Token by token or several at once, for three responses at once; each is read up to the first box that is closed."""
    longest = max(map(len, PIECES))
    table = np.array([list(piece.ljust(longest, b"\0")) for piece in PIECES], np.uint8)
    sizes = np.array([len(piece) for piece in PIECES], np.int32)
    tokens_TxM = np.array(rows, np.int32).T
    parser, closed = start_parsers(3), []
    for first in range(0, 14, steps):
        parser, closed_KxM = append_tokens(parser, tokens_TxM[first : first + steps], table, sizes, bytes_per_check)
        closed += np.asarray(closed_KxM).tolist()
    for row, closed_T in zip(rows, zip(*closed, strict=True), strict=True):
        end = closed_T.index(True) + 1 if any(closed_T) else 14
        assert list(closed_T[:end]) == [is_closed(row[:n]) for n in range(1, end + 1)]


@pytest.mark.parametrize("steps", mostly_slow([1, 3, 4], 1))
def test_responses_end_at_their_box(params, expected, steps):
    """With a vocabulary that often closes boxes, each response is the full-length one up to the first token that does."""
    words = [b"</think>\\boxed{", b"a", b"}", b"b}", b"c"]
    vocab = [words[i % len(words)] for i in range(SHAPE.vocab)]
    sizes = np.array([len(word) for word in vocab], np.int32)
    table = np.array([list(word.ljust(sizes.max(), b"\0")) for word in vocab], np.uint8)
    endless, _ = run(params, stop_ids=(), slots=5)
    byte_vocab = ByteVocab(bytes_VxX=table, lengths_V=sizes)
    ours, _ = run(params, stop_ids=(), vocab=byte_vocab, slots=5, steps_per_check=steps)
    ends = set()
    for p, g in np.ndindex(P, G):
        tokens, length = endless.tokens_PxGxT[p, g].tolist(), T
        for n in range(1, T + 1):
            _, box, content = b"".join(vocab[t] for t in tokens[:n]).rpartition(b"</think>\\boxed{")
            if box and b"}" in content and content != b"}":
                length = n
                break
        closed = length < T or ours.ended_PxG[p, g] == Ended.BOX
        assert ours.lengths_PxG[p, g] == length and ours.ended_PxG[p, g] == (Ended.BOX if closed else Ended.LENGTH)
        assert ours.tokens_PxGxT[p, g, :length].tolist() == tokens[:length]
        ends.add(length)
    assert len(ends) > 4


# --- memory ---


def test_slots_are_planned_from_memory():
    def plan(requested, available):
        memory = RolloutMemory(fixed=1000, per_slot=100)
        return plan_slots(requested=requested, rollouts=64, memory=memory, resident=500, available=available)

    assert plan(0, 10**6) == 64
    assert plan(0, 2000) == 5
    assert plan(3, 2000) == 3
    assert plan(1000, 10**6) == 64
    for requested, available, fitting in ((6, 2000, 5), (0, 1599, 0)):
        with pytest.raises(UserError, match=rf"rollout\.decode_slots: .* hold {fitting}\. ") as raised:
            plan(requested, available)
        assert raised.value.field == "rollout.decode_slots"


@pytest.mark.parametrize(
    ("platform", "kv_heads", "head_size", "itemsize", "keys"),
    [
        ("tpu", 1, 128, 2, 128),
        ("tpu", 2, 128, 2, 64),
        ("tpu", 1, 64, 2, 128),
        ("tpu", 3, 64, 2, 64),
        ("tpu", 4, 64, 4, 32),
        ("tpu", 64, 128, 4, 32),
        ("tpu", 1, 96, 4, 64),
        ("cpu", 64, 128, 4, 64),
        ("gpu", 64, 128, 4, 64),
    ],
)
def test_a_block_of_own_tokens_has_64_kib_or_32_keys_on_a_tpu(platform, kv_heads, head_size, itemsize, keys):
    layout = CACHE_LAYOUTS[platform]
    sizes = {"kv_heads": kv_heads, "head_size": head_size, "itemsize": itemsize}
    assert own_block_size(layout, 8191, **sizes) == keys


@pytest.mark.parametrize(
    ("platform", "sizes"),
    [
        ("cpu", {1: 1, 47: 47, 64: 64, 65: 64}),
        ("gpu", {1: 16, 31: 32, 33: 64, 64: 64, 65: 64}),
        ("tpu", {1: 16, 31: 32, 33: 48, 300: 304, 512: 512, 513: 512}),
    ],
)
def test_a_block_holds_short_rows_in_a_size_that_the_kernels_can_read(platform, sizes):
    layout = CACHE_LAYOUTS[platform]
    most = max(sizes.values())
    assert {keys: layout.block_size(most, keys) for keys in sizes} == sizes


def test_planned_memory_equals_the_size_of_the_arrays():
    """A slot takes its part of the ring buffer."""
    size = {"prompts": P, "prompt_tokens": 64, "samples": G, "max_new_tokens": 64}
    memory = rollout_memory(SHAPE, "float32", **size, tensor=1)
    dims = (SHAPE.layers, 1, SHAPE.kv_heads, 1, 64, SHAPE.head_size)
    ring = empty_ring(KeyValues(*(jnp.zeros(dims),) * 2), 10, 64, 32, "separate")
    rings = sum(x.nbytes for x in jax.tree.leaves(ring))
    assert 0 <= 10 * memory.per_slot - rings <= 10 * 12 * SHAPE.vocab
    halved = rollout_memory(SHAPE, "bfloat16", **size, tensor=2)
    assert halved.per_slot < memory.per_slot / 3 and halved.fixed < memory.fixed / 2
