"""Packing of prompts and responses into rows, with shared prefixes stored once per row.

A row is filled from both ends: responses from the left, and the prefixes that they continue from the right. If the
batch has several positions of a document, the longest of their prompts is the root. The others share a prefix with it,
and only their remaining tokens (the end of the template), the tail, are stored separately. A token attends to at most
three ranges of its row: the root, the tail of its prompt, and the earlier tokens of its own segment.

A prefix is a prompt without its last token. That token is stored at the start of every response, whose first token it
predicts, so the hidden states that predict a response are contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.key_ranges import KeyRanges, make_key_ranges, row_size

# A row has space for this many times the number of full-length responses that would fill it.
_RESPONSES_PER_ROW_FACTOR = 4
_NO_ROW = jnp.iinfo(jnp.int32).max


class Prefixes(NamedTuple):
    """The root of every prompt's prefix.

    Attributes:
      root_P: int32 prompt whose prefix is the root of prompt p. Roots are their own root.
      shared_P: int32 number of tokens that prompt p shares with the prefix of its root.
    """

    root_P: jax.Array
    shared_P: jax.Array


class Packing(NamedTuple):
    """Position of the R = P·G responses in the rows, in packing order.

    Attributes:
      response_R: int32 index p·G + g.
      row_R: int32 row, ascending; `int32` maximum for a response that is not in any row.
      start_R: int32 first token of the response in its row.
      root_start_R: int32 first token of its root in its row.
      tail_start_R: int32 first token of its prompt's tail in its row.
      opens_root_R: bool, whether it is the first response in its row with this root.
      opens_tail_R: bool, whether it is the first response in its row with this tail.
      rows: int32 number of rows.
    """

    response_R: jax.Array
    row_R: jax.Array
    start_R: jax.Array
    root_start_R: jax.Array
    tail_start_R: jax.Array
    opens_root_R: jax.Array
    opens_tail_R: jax.Array
    rows: jax.Array


class Rows(NamedTuple):
    """N rows of W tokens with up to J responses each.

    Attributes:
      tokens_NxW: int32 ids.
      positions_NxW: int32 positions in the sequence of prompt and response.
      key_ranges: the keys that each token attends to.
      targets_NxW: int32 id that each token predicts, defined for the first `filled_N` tokens.
      filled_N: int32 number of response tokens, at the start of the row.
      responses_NxJ: int32 index p·G + g.
      lengths_NxJ: int32 length of each response; 0 for an empty entry.
      starts_NxJ: int32 first token of each response.
      used: int32 number of tokens without padding.
    """

    tokens_NxW: jax.Array
    positions_NxW: jax.Array
    key_ranges: KeyRanges
    targets_NxW: jax.Array
    filled_N: jax.Array
    responses_NxJ: jax.Array
    lengths_NxJ: jax.Array
    starts_NxJ: jax.Array
    used: jax.Array

    def take_responses(self, x_PxG: jax.Array) -> jax.Array:
        """Return the entries of `x_PxG` [P, G, …] that belong to the responses of these rows, [N, J, …]."""
        return x_PxG.reshape(-1, *x_PxG.shape[2:])[self.responses_NxJ]

    def split(self, x_NxW: jax.Array, size: int) -> jax.Array:
        """Split values per token into values per response, [N, J, size]; undefined after each response's length."""
        index_NxJxT = jnp.minimum(self.starts_NxJ[..., None] + jnp.arange(size), x_NxW.shape[1] - 1)
        return jnp.take_along_axis(x_NxW[:, None], index_NxJxT, axis=2)


class PackedGroups(NamedTuple):
    """Groups of responses and their position in rows. Rows are built pass by pass.

    Attributes:
      prompts_PxS, lengths_P, tokens_PxGxT, response_lengths_PxG: int32, of the batch.
      prefixes: roots of the prompts.
      packing: position of every response.
      row_count: N, rows per pass.
      row_size: W, tokens per row.
      row_responses: J, space for responses per row.
    """

    prompts_PxS: jax.Array
    lengths_P: jax.Array
    tokens_PxGxT: jax.Array
    response_lengths_PxG: jax.Array
    prefixes: Prefixes
    packing: Packing
    row_count: int
    row_size: int
    row_responses: int

    @property
    def passes(self) -> jax.Array:
        """Number of passes over all rows, int32."""
        return -(-self.packing.rows // self.row_count)

    def rows(self, index: jax.Array) -> Rows:
        """Build the rows of pass `index`."""
        return build_rows(self, first_row=index * self.row_count)


@jax.named_scope("packing")
def pack_groups(
    *,
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    tokens_PxGxT: jax.Array,
    response_lengths_PxG: jax.Array,
    window_P: jax.Array,
    used_P: jax.Array,
    rows: int,
    microbatch_tokens: int,
) -> PackedGroups:
    """Pack groups of responses into rows.

    Args:
      prompts_PxS: int32 prompt ids, padded on the right.
      lengths_P: int32 prompt lengths.
      tokens_PxGxT: int32 response ids.
      response_lengths_PxG: int32 response lengths.
      window_P: int32 document window of each prompt; only prompts of one window share prefixes.
      used_P: bool, groups to pack.
      rows: rows per pass.
      microbatch_tokens: tokens per row, rounded up to whole attention blocks.

    Raises: ValueError, if a prompt and a response of maximum length do not fit in a row.
    """
    groups, prompt_size = prompts_PxS.shape
    samples, response_size = tokens_PxGxT.shape[1:]
    size = row_size(min(microbatch_tokens, groups * (prompt_size - 1 + samples * response_size)))
    if size < prompt_size - 1 + response_size:
        raise ValueError(
            f"a row of {size} tokens does not hold a prompt of {prompt_size} and a response of {response_size} tokens."
        )
    row_responses = min(groups * samples, max(1, _RESPONSES_PER_ROW_FACTOR * size // response_size))
    prefixes = shared_prefixes(prompts_PxS, lengths_P, window_P, used_P, max_tokens=size - response_size)
    packing = pack(lengths_P, response_lengths_PxG, used_P, prefixes, row_size=size, row_responses=row_responses)
    return PackedGroups(
        prompts_PxS=prompts_PxS,
        lengths_P=lengths_P,
        tokens_PxGxT=tokens_PxGxT,
        response_lengths_PxG=response_lengths_PxG,
        prefixes=prefixes,
        packing=packing,
        row_count=rows,
        row_size=size,
        row_responses=row_responses,
    )


def shared_prefixes(
    prompts_PxS: jax.Array, lengths_P: jax.Array, window_P: jax.Array, used_P: jax.Array, max_tokens: int
) -> Prefixes:
    """Choose a root for each prompt: the longest used prompt of its window that shares at least half of its prefix.

    A prompt is its own root if there is none, or if root and tail together would take more than `max_tokens` tokens of
    a row.
    """
    # The number of tokens that the prefixes of each pair of prompts have in common.
    prefix_P = lengths_P - 1
    itself_P = jnp.arange(len(lengths_P), dtype=jnp.int32)
    index_S = jnp.arange(prompts_PxS.shape[1], dtype=jnp.int32)
    differs_PxPxS = (prompts_PxS[:, None] != prompts_PxS) | (index_S >= prefix_P[:, None, None])
    differs_PxPxS |= index_S >= prefix_P[None, :, None]
    common_PxP = jnp.min(jnp.where(differs_PxPxS, index_S, len(index_S)), axis=-1)
    # Pairs in which the second prompt may be the root of the first.
    candidate_PxP = (window_P[:, None] == window_P) & used_P & (2 * common_PxP >= prefix_P[:, None])
    candidate_PxP &= prefix_P + prefix_P[:, None] - common_PxP <= max_tokens

    def longest(choices_PxP: jax.Array) -> jax.Array:
        best_P = jnp.argmax(jnp.where(choices_PxP, lengths_P, -1), axis=1).astype(jnp.int32)
        return jnp.where(choices_PxP.any(axis=1), best_P, itself_P)

    # Only prompts that would be their own root may be roots of others, so that roots form a forest of depth one.
    root_P = longest(candidate_PxP & (longest(candidate_PxP) == itself_P))
    return Prefixes(root_P=root_P, shared_P=common_PxP[itself_P, root_P])


class _OpenRow(NamedTuple):
    """The row that is being filled.

    Attributes:
      row: its index.
      left: tokens filled from the left, with responses.
      right: tokens filled from the right, with prefixes.
      responses: number of responses.
      prompt, tail_start: the prompt of the last response, -1 in an empty row, and the first token of its tail.
      root, root_start: the root of the last response, -1 in an empty row, and its first token.
    """

    row: jax.Array
    left: jax.Array
    right: jax.Array
    responses: jax.Array
    prompt: jax.Array
    tail_start: jax.Array
    root: jax.Array
    root_start: jax.Array

    @classmethod
    def empty(cls, row: jax.Array) -> _OpenRow:
        zero = jnp.int32(0)
        none = jnp.int32(-1)
        return cls(
            row=row, left=zero, right=zero, responses=zero, prompt=none, tail_start=zero, root=none, root_start=zero
        )


def pack(
    lengths_P: jax.Array,
    response_lengths_PxG: jax.Array,
    used_P: jax.Array,
    prefixes: Prefixes,
    *,
    row_size: int,
    row_responses: int,
) -> Packing:
    """Assign the responses of the used prompts to rows, filling one row after the other.

    A response that does not fit, together with the parts of its prompt that the row lacks, opens the next row, where
    its prefix is stored again. The longest prefix and the longest response must fit in one row.

    Args:
      lengths_P: int32 prompt lengths.
      response_lengths_PxG: int32 response lengths.
      used_P: bool, prompts to pack.
      prefixes: roots of the prompts.
      row_size: tokens per row.
      row_responses: maximum number of responses per row.
    """
    # Used prompts first, those with the same root next to each other.
    samples = response_lengths_PxG.shape[1]
    order_P = jnp.lexsort((prefixes.root_P, ~used_P))
    response_R = (order_P[:, None] * samples + jnp.arange(samples)).reshape(-1).astype(jnp.int32)
    prompt_R = response_R // samples
    root_R = prefixes.root_P[prompt_R]
    inputs = {
        "used": used_P[prompt_R],
        "prompt": prompt_R,
        "root": root_R,
        "response_tokens": response_lengths_PxG.reshape(-1)[response_R],
        "tail_tokens": lengths_P[prompt_R] - 1 - prefixes.shared_P[prompt_R],
        "root_tokens": lengths_P[root_R] - 1,
    }

    def place(row: _OpenRow, x: dict[str, jax.Array]) -> tuple[_OpenRow, dict[str, jax.Array]]:
        # Open the next row if this one lacks space for the response and the parts of its prompt.
        needed = x["response_tokens"]
        needed += jnp.where(x["prompt"] != row.prompt, x["tail_tokens"], 0)
        needed += jnp.where(x["root"] != row.root, x["root_tokens"], 0)
        full = (row.left + row.right + needed > row_size) | (row.responses == row_responses)
        row = jax.tree.map(lambda new, old: jnp.where(full, new, old), _OpenRow.empty(row.row + 1), row)

        # Fill from the right: the root and the tail, unless the previous response in the row has the same.
        opens_root = x["root"] != row.root
        opens_tail = x["prompt"] != row.prompt
        right = row.right + jnp.where(opens_root, x["root_tokens"], 0)
        root_start = jnp.where(opens_root, row_size - right, row.root_start)
        right = right + jnp.where(opens_tail, x["tail_tokens"], 0)
        tail_start = jnp.where(opens_tail, row_size - right, row.tail_start)
        # Fill from the left: the response.
        placed = {
            "row_R": jnp.where(x["used"], row.row, _NO_ROW),
            "start_R": row.left,
            "root_start_R": root_start,
            "tail_start_R": tail_start,
            "opens_root_R": opens_root,
            "opens_tail_R": opens_tail,
        }
        row = _OpenRow(
            row=row.row,
            left=row.left + x["response_tokens"],
            right=right,
            responses=row.responses + 1,
            prompt=x["prompt"],
            tail_start=tail_start,
            root=x["root"],
            root_start=root_start,
        )
        return row, placed

    # One response after the other: where one goes depends on all before it.
    _, placed_R = jax.lax.scan(place, _OpenRow.empty(jnp.int32(0)), inputs)
    row_R = placed_R["row_R"]
    rows = jnp.max(jnp.where(row_R == _NO_ROW, -1, row_R)) + 1
    return Packing(response_R=response_R, **placed_R, rows=rows)


class _Segments(NamedTuple):
    """Segments of rows, each a range of consecutive tokens of the sequence of a prompt and its response.

    Attributes:
      response: int32 index p·G + g of the sequence.
      base: int32 first token of the range.
      length: int32 number of tokens.
      root_begin, root_end: int32 range of the row that holds the root; empty if the segment does not attend to one.
      tail_begin, tail_end: int32 range of the row that holds the tail; empty if the segment does not attend to one.
    """

    response: jax.Array
    base: jax.Array
    length: jax.Array
    root_begin: jax.Array
    root_end: jax.Array
    tail_begin: jax.Array
    tail_end: jax.Array


@jax.named_scope("packing")
def build_rows(groups: PackedGroups, first_row: jax.Array) -> Rows:
    """Build `groups.row_count` rows from row `first_row` on."""
    n = groups.row_count
    size = groups.row_size
    packing = groups.packing
    prefixes = groups.prefixes
    lengths_P = groups.lengths_P
    samples = groups.tokens_PxGxT.shape[1]

    # Responses of each row. The last index may occur several times because of clamping, a row has a response only once.
    row_N = first_row + jnp.arange(n)
    index_NxJ = jnp.searchsorted(packing.row_R, row_N)[:, None] + jnp.arange(groups.row_responses)
    index_NxJ = jnp.minimum(index_NxJ, len(packing.row_R) - 1)
    live_NxJ = (packing.row_R[index_NxJ] == row_N[:, None]) & (jnp.diff(index_NxJ, prepend=-1) > 0)
    response = packing.response_R[index_NxJ]
    start = packing.start_R[index_NxJ]
    root_start = packing.root_start_R[index_NxJ]
    tail_start = packing.tail_start_R[index_NxJ]
    prompt = response // samples
    root = prefixes.root_P[prompt]
    shared = prefixes.shared_P[prompt]
    prefix = lengths_P[prompt] - 1
    length = jnp.where(live_NxJ, groups.response_lengths_PxG.reshape(-1)[response], 0)

    # Three kinds of segments: responses, the roots and tails that they open.
    zero = jnp.zeros_like(start)
    responses = _Segments(
        response=response,
        base=prefix,
        length=length,
        root_begin=root_start,
        root_end=root_start + shared,
        tail_begin=tail_start,
        tail_end=tail_start + prefix - shared,
    )
    roots = _Segments(
        response=root * samples,
        base=zero,
        length=lengths_P[root] - 1,
        root_begin=zero,
        root_end=zero,
        tail_begin=zero,
        tail_end=zero,
    )
    tails = _Segments(
        response=response,
        base=shared,
        length=prefix - shared,
        root_begin=root_start,
        root_end=root_start + shared,
        tail_begin=zero,
        tail_end=zero,
    )
    starts_NxJ = jnp.concatenate(
        [
            start,
            jnp.where(live_NxJ & packing.opens_root_R[index_NxJ], root_start, size),
            jnp.where(live_NxJ & packing.opens_tail_R[index_NxJ], tail_start, size),
        ],
        axis=1,
    )
    segments = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), responses, roots, tails)
    begin_NxW, segment = _segment_of_tokens(segments, starts_NxJ, size)

    # Tokens and targets, from the prompt or the response of each token's segment.
    offset_NxW = jnp.arange(size) - begin_NxW
    real_NxW = offset_NxW < segment.length
    position_NxW = segment.base + offset_NxW
    past_prompt_NxW = position_NxW - lengths_P[segment.response // samples]
    prompt_size = groups.prompts_PxS.shape[1]
    prompt_token = groups.prompts_PxS[segment.response // samples, jnp.clip(position_NxW, 0, prompt_size - 1)]
    flat_RxT = groups.tokens_PxGxT.reshape(-1, groups.tokens_PxGxT.shape[2])
    response_token, target = (
        flat_RxT[segment.response, jnp.clip(past_prompt_NxW + i, 0, flat_RxT.shape[1] - 1)] for i in (0, 1)
    )

    # Key ranges: root, tail, own segment. Padding attends to itself, since a softmax over no keys is NaN.
    own_begin = jnp.where(real_NxW, begin_NxW, jnp.arange(size))
    own_end = jnp.broadcast_to(jnp.arange(1, size + 1), position_NxW.shape)
    earlier = jax.tree.map(lambda x: jnp.where(real_NxW, x, 0), segment)
    key_ranges = make_key_ranges(
        jnp.stack([earlier.root_begin, earlier.tail_begin, own_begin], axis=1).astype(jnp.int32),
        jnp.stack([earlier.root_end, earlier.tail_end, own_end], axis=1).astype(jnp.int32),
    )
    return Rows(
        tokens_NxW=jnp.where(real_NxW, jnp.where(past_prompt_NxW < 0, prompt_token, response_token), 0),
        positions_NxW=jnp.where(real_NxW, position_NxW, 0),
        key_ranges=key_ranges,
        targets_NxW=target,
        filled_N=length.sum(axis=1),
        responses_NxJ=response,
        lengths_NxJ=length,
        starts_NxJ=start,
        used=real_NxW.sum(),
    )


def _segment_of_tokens(segments: _Segments, starts_NxJ: jax.Array, size: int) -> tuple[jax.Array, _Segments]:
    """Return for each token where its segment begins, int32 [N, W], and the fields of that segment, [N, W] each.

    The segment of a token is the last one that begins at or before it.

    Args:
      segments: J segments of each row, each field [N, J].
      starts_NxJ: int32 first token of each segment; `size` or more for a segment that is not in the row.
      size: tokens per row.
    """
    # Of two segments with the same start, one is empty. Empty ones are dropped.
    starts_NxJ = jnp.where(segments.length > 0, starts_NxJ, size)
    rows_Nx1 = jnp.arange(len(starts_NxJ))[:, None]
    # All fields in one array, so that there is one scatter and one gather.
    names = _Segments._fields
    fields_NxJxF = jnp.stack([getattr(segments, name) for name in names], axis=-1)
    table_NxWxF = jnp.zeros((len(starts_NxJ), size, len(names)), jnp.int32)
    table_NxWxF = table_NxWxF.at[rows_Nx1, starts_NxJ].set(fields_NxJxF, mode="drop")
    starts_here_NxW = table_NxWxF[..., names.index("length")] > 0
    begin_NxW = jax.lax.cummax(jnp.where(starts_here_NxW, jnp.arange(size), 0), axis=1)
    table_NxWxF = jnp.take_along_axis(table_NxWxF, begin_NxW[..., None], axis=1)
    return begin_NxW, _Segments(**{name: table_NxWxF[..., i] for i, name in enumerate(names)})


def fitting_divisor(total: int, maximum: int, multiple: int = 1) -> int:
    """Return the largest divisor of `total` that is at most `maximum` and, if possible, a multiple of `multiple`."""
    divisors = [size for size in range(1, max(1, min(maximum, total)) + 1) if total % size == 0]
    return max([size for size in divisors if size % multiple == 0] or divisors)
