"""Rows of packed groups: against a plain reading of who sees what, and attention over them against all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.attention.packed import attend_packed, make_key_ranges
from rpt_jax.objective.packing import fitting_divisor, pack_groups, shared_prefixes

P, G, S, T = 6, 3, 7, 4


def groups(seed: int) -> dict[str, np.ndarray]:
    """Prompts of two documents, most of them beginnings of one text with an ending of their own; some are of another."""
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
        "wanted_P": rng.random(P) < 0.8,
    }


def write_out(arrays, rows, row_tokens):
    def run(arrays):
        packed = pack_groups(**arrays, rows=rows, row_tokens=row_tokens)
        return packed.packing.rows, packed.prefixes, jax.lax.map(packed.rows, jnp.arange(P * G))

    return jax.jit(run)(arrays)


@pytest.mark.parametrize(("rows", "row_tokens"), [(1, S - 1 + T), (2, 17), (1, 60), (3, 1000)])
def test_every_token_sees_its_own_past_and_nothing_else(rows, row_tokens):
    """Of each wanted response once: read back from its row, what a token sees is its prompt and response so far, in order."""
    for seed in range(8):
        arrays = groups(seed)
        filled, _, passes = jax.device_get(write_out(arrays, rows, row_tokens))
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
                    ranges = zip(part.seen.begin_NxMxW[n, :, w], part.seen.end_NxMxW[n, :, w], strict=True)
                    keys = [k for begin, end in ranges for k in range(begin, end)]
                    assert part.tokens_NxW[n, keys].tolist() == whole[: length + t]
                    assert part.positions_NxW[n, keys].tolist() == list(range(length + t))
        wanted = [p * G + g for p in range(P) if arrays["wanted_P"][p] for g in range(G)]
        assert sorted(found) == wanted


def test_a_document_stands_once_in_a_row():
    """Contexts of 2, 4 and 6 tokens with the same ending: six tokens of the longest, and the endings of the others."""
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
        "wanted_P": np.ones(3, bool),
    }
    shared, alone = (
        jax.device_get(write_out(arrays | {"window_P": documents}, 1, 100))
        for documents in (np.zeros(3, np.int32), np.arange(3))
    )
    assert shared[1].root_P.tolist() == [2, 2, 2] and shared[1].shared_P.tolist() == [2, 4, 7]
    assert shared[2].used[0] == 7 + 1 + 1 + 6 * 4 and alone[2].used[0] == 7 + 5 + 3 + 6 * 4


def test_who_is_cut_off_from_the_longest_has_another_root():
    """Long contexts begin in the middle of their document: the others still have each other."""
    prompts = np.array([[9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 0, 0], [1, 9, 9, 9, 9, 9]], np.int32)
    lengths, everyone = np.array([6, 5, 4, 6], np.int32), np.ones(4, bool)
    found = shared_prefixes(prompts, lengths, np.zeros(4, np.int32), everyone, 9)
    assert found.root_P.tolist() == [0, 1, 1, 3] and found.shared_P.tolist() == [5, 4, 3, 5]
    # Who is not wanted is nobody's root.
    found = shared_prefixes(prompts, lengths, np.zeros(4, np.int32), np.array([True, False, True, True]), 9)
    assert found.root_P.tolist()[2] == 2
    # Nor is there sharing where the root and what is beside it would leave no room for a response.
    longer = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 0, 0]], np.int32), np.array([6, 4], np.int32)
    for room, root in ((6, 0), (5, 1)):
        found = shared_prefixes(*longer, np.zeros(2, np.int32), np.ones(2, bool), room)
        assert found.root_P.tolist() == [0, root]


def test_what_does_not_fit_in_a_row_is_refused():
    with pytest.raises(ValueError, match="a row of 9 tokens does not hold a prompt of 7 and a response of 4"):
        write_out(groups(0), 1, 9)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 5))
@settings(max_examples=50)
def test_fitting_divisor(total, most, multiple):
    part = fitting_divisor(total, most, multiple)
    fitting = [n for n in range(1, most + 1) if total % n == 0]
    assert part == max([n for n in fitting if n % multiple == 0] or fitting)


# --- attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "rows"), [(1, 2), (3, 2), (6, 1)])
def test_attention_in_blocks_is_attention(blocks, rows):
    """Forward and backward, for any ranges: also such that overlap, are empty, or lie on a border of blocks."""
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
        end[:, -1] = np.maximum(end[:, -1], begin[:, -1] + 1)  # Everyone sees something.
        theirs, ours = both((begin, end))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_blocks_that_nobody_sees_are_not_looked_at():
    """Two halves of a row that do not see each other: each block of queries counts its own half's blocks alone."""
    places = np.arange(16, dtype=np.int32)
    begin, end = (places // 8 * 8)[None, None], (places + 1)[None, None]
    seen = make_key_ranges(begin, end, block=4)
    assert seen.counts_NxB.tolist() == [[1, 2, 1, 2]]
    assert seen.blocks_NxBxB[0, 3, :2].tolist() == [2, 3]
