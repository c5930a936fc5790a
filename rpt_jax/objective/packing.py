"""Rollouts packed in rows, for the trunk to run over: every prefix once a row, then response after response.

A row is filled from both ends: with responses from the left, and from the right with what they continue. That is a prompt; or,
where the batch holds several positions of a document, the longest of their prompts, the root, which the others begin with, and
behind it what each of these has of its own (its template's end). So a token sees at most three ranges of its row: the root, its
prompt's own part, and its own stretch. The last token of a prompt is run once more at the head of every response, whose first
token it predicts: what predicts a response then stands in one piece.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.packed import KeyRanges, make_key_ranges, row_size

# A row has slots for so many times the responses of full length that would fill it.
_CROWD = 4
_NOWHERE = jnp.iinfo(jnp.int32).max


class Prefixes(NamedTuple):
    """What prompts have in common: prompt p begins with `shared_P[p]` tokens of the prefix of prompt `root_P[p]`, int32.

    A prefix is a prompt without its last token. A root is its own root, and nobody's who has another one.
    """

    root_P: jax.Array
    shared_P: jax.Array


def shared_prefixes(
    prompts_PxS: jax.Array, lengths_P: jax.Array, window_P: jax.Array, wanted_P: jax.Array, room: int
) -> Prefixes:
    """Find the roots: prompts of a document that are as long as any that begin alike, at least for half of the shorter one.

    Who would take more than `room` tokens of a row together with the root goes alone.
    """
    prefix_P, itself_P = lengths_P - 1, jnp.arange(len(lengths_P), dtype=jnp.int32)
    places_S = jnp.arange(prompts_PxS.shape[1], dtype=jnp.int32)
    differs_PxPxS = (prompts_PxS[:, None] != prompts_PxS) | (places_S >= prefix_P[:, None, None])
    differs_PxPxS |= places_S >= prefix_P[None, :, None]
    common_PxP = jnp.min(jnp.where(differs_PxPxS, places_S, len(places_S)), axis=-1)
    alike_PxP = (window_P[:, None] == window_P) & wanted_P & (2 * common_PxP >= prefix_P[:, None])
    alike_PxP &= prefix_P + prefix_P[:, None] - common_PxP <= room

    def longest(choices_PxP: jax.Array) -> jax.Array:
        best_P = jnp.argmax(jnp.where(choices_PxP, lengths_P, -1), axis=1).astype(jnp.int32)
        return jnp.where(choices_PxP.any(axis=1), best_P, itself_P)

    # Whose longest has a longer one itself, which it does not begin like, looks among those that have not.
    root_P = longest(alike_PxP & (longest(alike_PxP) == itself_P))
    return Prefixes(root_P, common_PxP[itself_P, root_P])


class Packing(NamedTuple):
    """Where the R = P·G responses lie, in the order in which they were packed.

    Attributes:
      response_R: int32, p·G + g.
      row_R: int32, ascending; a very large number for those that are in no row.
      start_R, root_R, tail_R: int32, where in its row the response begins, its root, and what its prompt has of its own.
      opens_root_R, opens_tail_R: bool, the first in its row to need those two.
      rows: int32, how many were filled.
    """

    response_R: jax.Array
    row_R: jax.Array
    start_R: jax.Array
    root_R: jax.Array
    tail_R: jax.Array
    opens_root_R: jax.Array
    opens_tail_R: jax.Array
    rows: jax.Array


class _Filling(NamedTuple):
    """The row that is being filled, and what of it."""

    row: jax.Array
    left: jax.Array
    right: jax.Array
    responses: jax.Array
    prompt: jax.Array
    tail: jax.Array
    root: jax.Array
    root_at: jax.Array


def pack(
    lengths_P: jax.Array, response_lengths_PxG: jax.Array, wanted_P: jax.Array, prefixes: Prefixes, row: int, most: int
) -> Packing:
    """Fill rows of `row` tokens and `most` responses, one after the other, with the responses of the wanted prompts.

    A response that no longer fits, with what it needs of its prompt, begins the next row, and there its prefix stands again. The
    longest prefix and the longest response must fit together.
    """
    samples = response_lengths_PxG.shape[1]
    order_P = jnp.lexsort((prefixes.root_P, ~wanted_P))
    response_R = (order_P[:, None] * samples + jnp.arange(samples)).reshape(-1).astype(jnp.int32)
    prompt_R = response_R // samples
    root_R = prefixes.root_P[prompt_R]
    inputs = (
        wanted_P[prompt_R],
        prompt_R,
        root_R,
        response_lengths_PxG.reshape(-1)[response_R],
        lengths_P[prompt_R] - 1 - prefixes.shared_P[prompt_R],
        lengths_P[root_R] - 1,
    )

    def place(f: _Filling, inputs: tuple[jax.Array, ...]) -> tuple[_Filling, tuple[jax.Array, ...]]:
        wanted, prompt, root, response, tail, prefix = inputs
        needed = response + jnp.where(prompt != f.prompt, tail, 0) + jnp.where(root != f.root, prefix, 0)
        full = (f.left + f.right + needed > row) | (f.responses == most)
        f = jax.tree.map(lambda new, old: jnp.where(full, new, old), _empty(f.row + 1), f)
        opens_root, opens_tail = root != f.root, prompt != f.prompt
        right = f.right + jnp.where(opens_root, prefix, 0)
        root_at = jnp.where(opens_root, row - right, f.root_at)
        right = right + jnp.where(opens_tail, tail, 0)
        tail_at = jnp.where(opens_tail, row - right, f.tail)
        after = _Filling(f.row, f.left + response, right, f.responses + 1, prompt, tail_at, root, root_at)
        where = jnp.where(wanted, f.row, _NOWHERE), f.left, root_at, tail_at, opens_root, opens_tail
        return after, where

    _, (row_R, *rest) = jax.lax.scan(place, _empty(jnp.int32(0)), inputs)
    rows = jnp.max(jnp.where(row_R == _NOWHERE, -1, row_R)) + 1
    return Packing(response_R, row_R, *rest, rows)


def _empty(row: jax.Array) -> _Filling:
    zero, nobody = jnp.int32(0), jnp.int32(-1)
    return _Filling(row, zero, zero, zero, nobody, zero, nobody, zero)


class Rows(NamedTuple):
    """N rows of W tokens, with up to J responses each.

    Attributes:
      tokens_NxW, positions_NxW: int32.
      seen: what each of them sees.
      targets_NxW: int32, which token each predicts; of the first `filled_N` alone.
      responses_NxJ: int32, p·G + g; lengths_NxJ: int32 tokens, 0 where there is no response; starts_NxJ: int32.
    """

    tokens_NxW: jax.Array
    positions_NxW: jax.Array
    seen: KeyRanges
    targets_NxW: jax.Array
    filled_N: jax.Array
    responses_NxJ: jax.Array
    lengths_NxJ: jax.Array
    starts_NxJ: jax.Array
    used: jax.Array  # Tokens that are not padding.

    def of_responses(self, x_PxGxT: jax.Array) -> jax.Array:
        """Take what the rows' responses have, [N, J, T]."""
        return x_PxGxT.reshape(-1, *x_PxGxT.shape[2:])[self.responses_NxJ]

    def split(self, x_NxW: jax.Array, size: int) -> jax.Array:
        """Take what the rows' response tokens have, [N, J, size]; defined up to each response's length."""
        places_NxJxT = jnp.minimum(self.starts_NxJ[..., None] + jnp.arange(size), x_NxW.shape[1] - 1)
        return jnp.take_along_axis(x_NxW[:, None], places_NxJxT, axis=2)


class _Stretch(NamedTuple):
    """Consecutive tokens of a row: `length` tokens of a prompt and its response, from token `base` on."""

    response: jax.Array
    base: jax.Array
    length: jax.Array
    root_begin: jax.Array
    root_end: jax.Array
    tail_begin: jax.Array
    tail_end: jax.Array


class Packed(NamedTuple):
    """A batch of groups and where they lie: rows are written out when their turn comes.

    Attributes:
      prompts_PxS, lengths_P, tokens_PxGxT, response_lengths_PxG: int32, of the batch.
      prefixes, packing: see there.
      shape: (N, W, J) of the rows that are run at one time.
    """

    prompts_PxS: jax.Array
    lengths_P: jax.Array
    tokens_PxGxT: jax.Array
    response_lengths_PxG: jax.Array
    prefixes: Prefixes
    packing: Packing
    shape: tuple[int, int, int]

    @property
    def passes(self) -> jax.Array:
        """How often N rows are run until all are."""
        return -(-self.packing.rows // self.shape[0])

    def rows(self, index: jax.Array) -> Rows:
        """The rows of pass `index`."""
        first = index * self.shape[0]
        return lay_out(*self[:6], first, self.shape)


def pack_groups(
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    tokens_PxGxT: jax.Array,
    response_lengths_PxG: jax.Array,
    window_P: jax.Array,
    wanted_P: jax.Array,
    *,
    rows: int,
    row_tokens: int,
) -> Packed:
    """Pack the groups that are wanted, to be run `rows` rows of about `row_tokens` tokens at a time.

    Raises: ValueError, where the longest prompt and response that there can be do not fit in a row.
    """
    (groups, size), (samples, limit) = prompts_PxS.shape, tokens_PxGxT.shape[1:]
    row = row_size(min(row_tokens, groups * (size - 1 + samples * limit)))
    if row < size - 1 + limit:
        raise ValueError(f"a row of {row} tokens does not hold a prompt of {size} and a response of {limit} tokens.")
    prefixes = shared_prefixes(prompts_PxS, lengths_P, window_P, wanted_P, row - limit)
    most = min(groups * samples, max(1, _CROWD * row // limit))
    packing = pack(lengths_P, response_lengths_PxG, wanted_P, prefixes, row, most)
    return Packed(prompts_PxS, lengths_P, tokens_PxGxT, response_lengths_PxG, prefixes, packing, (rows, row, most))


def lay_out(
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    tokens_PxGxT: jax.Array,
    response_lengths_PxG: jax.Array,
    prefixes: Prefixes,
    packing: Packing,
    first: jax.Array,
    shape: tuple[int, int, int],
) -> Rows:
    """Write rows `first` and after out; `shape` is (N, W, J)."""
    n, size, most = shape
    samples = tokens_PxGxT.shape[1]
    row_N = first + jnp.arange(n)
    index_NxJ = jnp.searchsorted(packing.row_R, row_N)[:, None] + jnp.arange(most)
    index_NxJ = jnp.minimum(index_NxJ, len(packing.row_R) - 1)
    # The last index may come up several times; a row has no response twice.
    live_NxJ = (packing.row_R[index_NxJ] == row_N[:, None]) & (jnp.diff(index_NxJ, prepend=-1) > 0)
    response, _, start, root_at, tail_at, opens_root, opens_tail = (x[index_NxJ] for x in packing[:-1])
    prompt = response // samples
    root, shared, prefix = prefixes.root_P[prompt], prefixes.shared_P[prompt], lengths_P[prompt] - 1
    length = jnp.where(live_NxJ, response_lengths_PxG.reshape(-1)[response], 0)
    none, ends = jnp.zeros_like(start), (root_at, root_at + shared)
    stretches = (
        _Stretch(response, prefix, length, *ends, tail_at, tail_at + prefix - shared),
        _Stretch(root * samples, none, lengths_P[root] - 1, none, none, none, none),
        _Stretch(response, shared, prefix - shared, *ends, none, none),
    )
    places = start, *(jnp.where(live_NxJ & o, at, size) for o, at in ((opens_root, root_at), (opens_tail, tail_at)))
    begin_NxW, stretch = _spread(stretches, places, size)
    offset_NxW = jnp.arange(size) - begin_NxW
    inside_NxW = offset_NxW < stretch.length
    x_NxW = stretch.base + offset_NxW
    past_NxW = x_NxW - lengths_P[stretch.response // samples]
    of_prompt = prompts_PxS[stretch.response // samples, jnp.clip(x_NxW, 0, prompts_PxS.shape[1] - 1)]
    flat = tokens_PxGxT.reshape(-1, tokens_PxGxT.shape[2])
    of_response, targets = (flat[stretch.response, jnp.clip(past_NxW + i, 0, flat.shape[1] - 1)] for i in (0, 1))
    # Padding sees itself, because a softmax over nothing is no number.
    own = jnp.where(inside_NxW, begin_NxW, jnp.arange(size)), jnp.broadcast_to(jnp.arange(1, size + 1), x_NxW.shape)
    earlier = jax.tree.map(lambda x: jnp.where(inside_NxW, x, 0), stretch)
    begins = jnp.stack([earlier.root_begin, earlier.tail_begin, own[0]], axis=1)
    seen = make_key_ranges(
        begins.astype(jnp.int32), jnp.stack([earlier.root_end, earlier.tail_end, own[1]], axis=1).astype(jnp.int32)
    )
    return Rows(
        jnp.where(inside_NxW, jnp.where(past_NxW < 0, of_prompt, of_response), 0),
        jnp.where(inside_NxW, x_NxW, 0),
        seen,
        targets,
        length.sum(axis=1),
        response,
        length,
        start,
        inside_NxW.sum(),
    )


def _spread(stretches: tuple[_Stretch, ...], places: tuple[jax.Array, ...], size: int) -> tuple[jax.Array, _Stretch]:
    """Tell every token of the rows where its stretch begins, and all of that stretch: the last one that begins before it."""
    fields_NxJxF = jnp.concatenate([jnp.stack(s, axis=-1) for s in stretches], axis=1)
    places_NxJ = jnp.concatenate(places, axis=1)
    # Two that begin at one place would be one without a token and another: the empty one is left out.
    places_NxJ = jnp.where(fields_NxJxF[..., 2] > 0, places_NxJ, size)
    rows_Nx1 = jnp.arange(len(places_NxJ))[:, None]
    table_NxWxF = jnp.zeros((len(places_NxJ), size, fields_NxJxF.shape[-1]), jnp.int32)
    table_NxWxF = table_NxWxF.at[rows_Nx1, places_NxJ].set(fields_NxJxF, mode="drop")
    begins_NxW = jax.lax.cummax(jnp.where(table_NxWxF[..., 2] > 0, jnp.arange(size), 0), axis=1)
    spread_NxWxF = jnp.take_along_axis(table_NxWxF, begins_NxW[..., None], axis=1)
    return begins_NxW, _Stretch(*jnp.moveaxis(spread_NxWxF, -1, 0))


def fitting_divisor(total: int, most: int, multiple: int = 1) -> int:
    """The largest size, at most `most`, of equal parts of `total`: a multiple of `multiple`, where there is such a one."""
    parts = [size for size in range(1, max(1, min(most, total)) + 1) if total % size == 0]
    return max([size for size in parts if size % multiple == 0] or parts)
