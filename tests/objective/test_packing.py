"""Packed rows against a direct computation of what each token attends to, and attention over them against dense attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.attention.key_ranges import make_key_ranges
from rpt_jax.model.attention.packed import attend_packed
from rpt_jax.objective.packing import fitting_divisor, pack_groups, shared_prefixes
from tests.helpers.parameters import mostly_slow

P, G, S, T = 6, 3, 7, 4


def groups(seed: int) -> dict[str, np.ndarray]:
    """Return prompts of two documents. Most are a prefix of the document with a different ending, some are unrelated to it."""
    rng = np.random.default_rng(seed)
    text, lengths = rng.integers(1, 9, (2, S)), rng.integers(1, S + 1, P)
    document = rng.integers(0, 2, P)
    prompts = np.where(np.arange(S) < lengths[:, None] - rng.integers(0, 3, P)[:, None], text[document], 9)
    odd = rng.random(P) < 0.2
    prompts[odd] = rng.integers(20, 30, (P, S))[odd]
    return {
        "prompts_PxS": prompts.astype(np.int32),
        "lengths_P": lengths.astype(np.int32),
        "tokens_PxGxT": rng.integers(100, 200, (P, G, T)).astype(np.int32),
        "response_lengths_PxG": rng.integers(1, T + 1, (P, G)).astype(np.int32),
        "window_P": document.astype(np.int32),
        "used_P": rng.random(P) < 0.8,
    }


def pack_all(arrays, rows, microbatch_tokens):
    """Return the number of rows, the prefixes, and the rows of every pass."""

    def run(arrays):
        packed = pack_groups(**arrays, rows=rows, microbatch_tokens=microbatch_tokens)
        return packed.packing.rows, packed.prefixes, jax.lax.map(packed.rows, jnp.arange(P * G))

    return jax.jit(run)(arrays)


@pytest.mark.parametrize(
    ("rows", "microbatch_tokens"), mostly_slow([(1, S - 1 + T), (2, 17), (1, 60), (3, 200)], (2, 17), (3, 200))
)
def test_every_token_attends_to_its_own_past_only(rows, microbatch_tokens):
    """Each used response is in one row, where its tokens attend to the prompt and the response so far, in order."""
    for seed in range(8):
        arrays = groups(seed)
        filled, _, passes = jax.device_get(pack_all(arrays, rows, microbatch_tokens))
        found = []
        for index in range(-(-int(filled) // rows)):
            part = jax.tree.map(lambda x, index=index: x[index], passes)
            for n, j in zip(*np.nonzero(part.lengths_NxJ), strict=True):
                response = int(part.responses_NxJ[n, j])
                found.append(response)
                p, g = divmod(response, G)
                length = arrays["lengths_P"][p]
                whole = [*arrays["prompts_PxS"][p, :length], *arrays["tokens_PxGxT"][p, g]]
                for t in range(part.lengths_NxJ[n, j]):
                    w = part.starts_NxJ[n, j] + t
                    assert w < part.filled_N[n] and part.targets_NxW[n, w] == whole[length + t]
                    ranges = zip(part.key_ranges.begin_NxMxW[n, :, w], part.key_ranges.end_NxMxW[n, :, w], strict=True)
                    keys = [k for begin, end in ranges for k in range(begin, end)]
                    assert part.tokens_NxW[n, keys].tolist() == whole[: length + t]
                    assert part.positions_NxW[n, keys].tolist() == list(range(length + t))
        used = [p * G + g for p in range(P) if arrays["used_P"][p] for g in range(G)]
        assert sorted(found) == used


def test_a_document_is_stored_once_per_row():
    """For contexts of 2, 4 and 6 tokens with the same ending, a row has six tokens of context and the three endings."""
    text = np.arange(1, 8)
    prompts, lengths = np.full((3, 8), 50, np.int32), np.array([4, 6, 8], np.int32)
    for row, size in zip(prompts, lengths - 2, strict=True):
        row[:size] = text[:size]
    arrays = {
        "prompts_PxS": prompts,
        "lengths_P": lengths,
        "tokens_PxGxT": np.full((3, 2, 4), 100, np.int32),
        "response_lengths_PxG": np.full((3, 2), 4, np.int32),
        "window_P": np.zeros(3, np.int32),
        "used_P": np.ones(3, bool),
    }
    shared, alone = (
        jax.device_get(pack_all(arrays | {"window_P": documents}, 1, 100))
        for documents in (np.zeros(3, np.int32), np.arange(3))
    )
    assert shared[1].root_P.tolist() == [2, 2, 2] and shared[1].shared_P.tolist() == [2, 4, 7]
    assert shared[2].used[0] == 7 + 1 + 1 + 6 * 4 and alone[2].used[0] == 7 + 5 + 3 + 6 * 4


def test_prompts_that_differ_from_the_longest_share_another_root():
    """A long context may start in the middle of its document; the other prompts then share prefixes with each other."""
    prompts = np.array([[9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 0, 0], [1, 9, 9, 9, 9, 9]], np.int32)
    lengths, all_used = np.array([6, 5, 4, 6], np.int32), np.ones(4, bool)
    found = shared_prefixes(prompts, lengths, np.zeros(4, np.int32), all_used, 9)
    assert found.root_P.tolist() == [0, 1, 1, 3] and found.shared_P.tolist() == [5, 4, 3, 5]
    # A prompt that is not used is not a root.
    found = shared_prefixes(prompts, lengths, np.zeros(4, np.int32), np.array([True, False, True, True]), 9)
    assert found.root_P.tolist()[2] == 2
    # Prompts do not share if root and tail together would leave no space for a response.
    longer = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 0, 0]], np.int32), np.array([6, 4], np.int32)
    for max_tokens, root in ((6, 0), (5, 1)):
        found = shared_prefixes(*longer, np.zeros(2, np.int32), np.ones(2, bool), max_tokens)
        assert found.root_P.tolist() == [0, root]


def test_a_row_that_cannot_hold_a_prompt_and_a_response_is_rejected():
    with pytest.raises(ValueError, match="a row of 9 tokens does not hold a prompt of 7 and a response of 4"):
        pack_all(groups(0), 1, 9)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 5))
@settings(max_examples=50)
def test_fitting_divisor_is_the_largest_one(total, maximum, multiple):
    divisor = fitting_divisor(total, maximum, multiple)
    fitting = [n for n in range(1, maximum + 1) if total % n == 0]
    assert divisor == max([n for n in fitting if n % multiple == 0] or fitting)


# --- attention ---


@pytest.mark.parametrize(("blocks", "rows"), [(1, 2), (3, 2), (6, 1)])
def test_packed_attention_equals_dense_attention(blocks, rows):
    """Outputs and gradients are equal for any ranges, including ones that overlap, are empty, or end at a block boundary."""
    size, m, rng = 24, 3, np.random.default_rng(blocks)
    q, k, v, dout = (
        rng.standard_normal(dims).astype(np.float32)
        for dims in ((rows, 2, 1, 3, size, 4), *[(rows, 2, 1, size, 4)] * 2, (rows, 2, 1, 3, size, 4))
    )

    @jax.jit
    def both(ranges):
        seen = make_key_ranges(*ranges, block=size // blocks)

        def total(arrays, attention):
            out = attend_packed(*arrays, seen, attention)
            return jnp.sum(out * dout), out

        return [jax.grad(total, has_aux=True)((q, k, v), name) for name in ("reference", "auto")]

    for _ in range(10):
        begin = rng.integers(0, size, (rows, m, size)).astype(np.int32)
        end = np.minimum(begin + rng.integers(0, 9, begin.shape), size).astype(np.int32)
        end[:, -1] = np.maximum(end[:, -1], begin[:, -1] + 1)  # Every token attends to something.
        theirs, ours = both((begin, end))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_blocks_without_visible_keys_are_skipped():
    """If the two halves of a row do not attend to each other, each block of queries lists only blocks of its own half."""
    index = np.arange(16, dtype=np.int32)
    begin, end = (index // 8 * 8)[None, None], (index + 1)[None, None]
    seen = make_key_ranges(begin, end, block=4)
    assert seen.counts_NxB.tolist() == [[1, 2, 1, 2]]
    assert seen.blocks_NxBxB[0, 3, :2].tolist() == [2, 3]
