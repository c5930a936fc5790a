r"""Byte-level parser of the prediction in the last `\boxed{}` of a response.

It works on the raw bytes of tokens inside a compiled program. Decoding to text and tokenizing again would change the
lengths of characters that are split between two tokens, and with them the token boundaries.

The paper specifies only "the last \boxed{} following the special token '</think>'". The complete rule used here is:

* The answer starts after the last end-of-thinking marker: the special token, or the bytes `</think>`.
* The prediction is the content of the last `\boxed{` in the answer, up to its balancing brace. A brace after an odd
  number of backslashes is escaped and does not count. If no brace balances, the prediction ends at the last `}` of the
  response.
* `\boxed{}}` is read as the prediction `}`. No whitespace is stripped.

This reading, "balanced", cannot express every token: a box around `}{` or `})` closes too early. A second one, "to_end",
can: the prediction is everything from the last `\boxed{` to a `}` that ends the response. If the response ends otherwise,
there is none.

The parser is a state machine that consumes one byte of every rollout per step and keeps a few scalars per rollout, so
memory does not grow with the length of the longest token in the vocabulary. Parsing starts at the block that contains
the last special marker, and the number of steps is the length of the longest answer in bytes (a token without bytes
counts as one).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.prompts.response_format import BOX
from rpt_jax.tokenizers.tokenizer import END_THINK

NO_PREDICTION = -1  # `prediction_size` of a response without a prediction.

_END_THINK = END_THINK.encode()
_BOX = BOX.encode()
_BACKSLASH, _OPEN, _CLOSE = b"\\{}"
_MARKER_BLOCK = 16  # Tokens per block in the search for the last special marker.


class BoxParser(NamedTuple):
    r"""State of the parser for one rollout. Every field is a scalar; `vmap` adds the batch axes.

    Attributes:
      token: int32 index of the token that is being read.
      offset: int32 index of the next byte of that token.
      think_matched: int32 number of bytes of `</think>` at the end of the input so far.
      box_matched: int32 number of bytes of `\boxed{` at the end of the answer so far.
      answering: bool, whether an end-of-thinking marker has been read.
      escaped: bool, whether the input so far ends with an odd number of backslashes.
      depth: int32 number of open braces in the last box; 0 after it is closed, or when there is none. With the reading
        "to_end", 1 for an open box, which is never closed.
      size: int32 number of bytes since the last box was opened.
      equal: bool, whether all those bytes equal the reference.
      prediction_size: int32 size of the prediction as far as it is known, or NO_PREDICTION.
      prediction_equal: bool, whether the prediction equals the reference up to its size.
      first_token: int32 index of the token that starts the prediction; -1 if no token starts there. None if not
        tracked.
      equal_size: int32 number of bytes of the last box, closed or not, before the first that differs from the reference. None if
        not tracked.
    """

    token: jax.Array
    offset: jax.Array
    think_matched: jax.Array
    box_matched: jax.Array
    answering: jax.Array
    escaped: jax.Array
    depth: jax.Array
    size: jax.Array
    equal: jax.Array
    prediction_size: jax.Array
    prediction_equal: jax.Array
    first_token: jax.Array | None = None
    equal_size: jax.Array | None = None


def start_parsers(rows: int, *, answering: bool = False) -> BoxParser:
    """Return the states of `rows` empty responses, each field [rows].

    Args:
      rows: number of responses.
      answering: whether the end-of-thinking marker is in front of them.
    """
    initial = _initial_state()._replace(answering=jnp.bool_(answering))
    return jax.tree.map(lambda x: jnp.full((rows,), x), initial)


def read_box(
    parser_M: BoxParser,
    token_KxM: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_think_id: int,
    bytes_per_check: int = 1,
) -> tuple[BoxParser, jax.Array]:
    r"""Append K tokens to each of M responses that are still being generated, with the reading "balanced".

    Args:
      parser_M: states after the previous tokens.
      token_KxM: int32 ids.
      vocab_bytes_VxX: uint8 raw bytes of every token.
      vocab_lengths_V: int32 number of bytes of every token.
      end_think_id: id of the end-of-thinking token, or -1.
      bytes_per_check: bytes that are read between two checks whether all responses have been read.

    Returns: the new states, and bool [K, M], whether the box of the answer is closed by its balancing brace after each
      token. For `\boxed{}`, which may continue as `\boxed{}}`, this is decided by the next byte.
    """
    count = len(token_KxM)

    def append(state: BoxParser, token_K: jax.Array) -> tuple[BoxParser, jax.Array]:
        def read_byte(state: BoxParser, closed_K: jax.Array) -> tuple[BoxParser, jax.Array]:
            is_current_K = jnp.arange(count) == state.token
            state = _step(
                state,
                token_K,
                jnp.int32(count),
                jnp.zeros(1, jnp.int32),  # There is no reference to compare with.
                vocab_bytes_VxX,
                vocab_lengths_V,
                end_think_id,
                reading="balanced",
            )
            # The last byte of a token decides.
            return state, jnp.where(is_current_K, _is_closed(state), closed_K)

        def read_bytes(carry: tuple[BoxParser, jax.Array]) -> tuple[BoxParser, jax.Array]:
            if bytes_per_check == 1:
                return read_byte(*carry)
            return jax.lax.fori_loop(0, bytes_per_check, lambda _, carry: read_byte(*carry), carry)

        state = state._replace(token=jnp.int32(0), offset=jnp.int32(0))
        return jax.lax.while_loop(lambda carry: carry[0].token < count, read_bytes, (state, jnp.zeros(count, bool)))

    return jax.vmap(append, in_axes=(0, 1), out_axes=(0, 1))(parser_M, token_KxM)


def _is_closed(state: BoxParser) -> jax.Array:
    undecided = (state.prediction_size == 0) & (state.size == 1)
    return (state.depth == 0) & (state.prediction_size >= 0) & ~undecided


@jax.named_scope("read_box")
def parse_responses(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    stopped_PxG: jax.Array,
    reference_PxR: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_think_id: int | jax.Array,
    *,
    reading: str,
    track_first_token: bool = False,
    track_equal_size: bool = False,
) -> BoxParser:
    """Parse every finished response to its end. The state of an unfinished one is undefined.

    Args:
      tokens_PxGxT: int32 response tokens; those at and after a response's length are ignored.
      lengths_PxG: int32 response lengths.
      stopped_PxG: bool, False for a response that was cut by the length limit.
      reference_PxR: uint8 bytes that the prediction is compared with.
      vocab_bytes_VxX: uint8 raw bytes of every token.
      vocab_lengths_V: int32 number of bytes of every token.
      end_think_id: id of the end-of-thinking token, or -1.
      reading: one of `config.schema.BOX_READINGS`.
      track_first_token: whether to fill in `BoxParser.first_token`.
      track_equal_size: whether to fill in `BoxParser.equal_size`.

    Returns: parser states, each field [P, G].
    """
    lengths_PxG = jnp.where(stopped_PxG, lengths_PxG, 0)
    vocab = vocab_bytes_VxX, vocab_lengths_V, end_think_id
    initial = _initial_state()
    if track_first_token:
        initial = initial._replace(first_token=jnp.int32(-1))
    if track_equal_size:
        initial = initial._replace(equal_size=jnp.int32(0))
    state_PxG = jax.tree.map(lambda x: jnp.broadcast_to(x, lengths_PxG.shape), initial)
    state_PxG = state_PxG._replace(token=_first_relevant_token(tokens_PxGxT, lengths_PxG, *vocab))
    step_G = jax.vmap(functools.partial(_step, reading=reading), in_axes=(0, 0, 0, None, None, None, None))
    step_PxG = jax.vmap(step_G, in_axes=(0, 0, 0, 0, None, None, None))
    return jax.lax.while_loop(
        lambda state: jnp.any(state.token < lengths_PxG),
        lambda state: step_PxG(state, tokens_PxGxT, lengths_PxG, reference_PxR, *vocab),
        state_PxG,
    )


@functools.partial(jax.jit, static_argnames="reading")
def predicted_first_token(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    stopped_PxG: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_think_id: int | jax.Array,
    *,
    reading: str = "balanced",
) -> jax.Array:
    """Return the first token of every prediction, y[0] in Appendix A of the paper, int32 [P, G].

    It is -1 for a response that is unfinished, has no prediction, or has no token that starts with the content of the
    box and ends within it. Tokens without bytes are skipped. The arguments are those of `parse_responses`.
    """
    no_reference_Px1 = jnp.zeros((tokens_PxGxT.shape[0], 1), jnp.uint8)
    state_PxG = parse_responses(
        tokens_PxGxT,
        lengths_PxG,
        stopped_PxG,
        no_reference_Px1,
        vocab_bytes_VxX,
        vocab_lengths_V,
        end_think_id,
        reading=reading,
        track_first_token=True,
    )
    index_PxG = state_PxG.first_token
    assert index_PxG is not None
    clipped_PxGx1 = jnp.clip(index_PxG, 0, tokens_PxGxT.shape[-1] - 1)[..., None]
    first_PxG = jnp.take_along_axis(tokens_PxGxT, clipped_PxGx1, axis=-1)[..., 0]
    known_PxG = (first_PxG >= 0) & (first_PxG < vocab_lengths_V.shape[0])
    size_PxG = jnp.where(known_PxG, vocab_lengths_V[first_PxG], 0)
    within_PxG = (index_PxG >= 0) & (size_PxG > 0) & (size_PxG <= state_PxG.prediction_size)
    return jnp.where(stopped_PxG & within_PxG, first_PxG, -1)


def _initial_state() -> BoxParser:
    zero = jnp.int32(0)
    false = jnp.bool_(False)
    return BoxParser(
        token=zero,
        offset=zero,
        think_matched=zero,
        box_matched=zero,
        answering=false,
        escaped=false,
        depth=zero,
        size=zero,
        equal=false,
        prediction_size=jnp.int32(NO_PREDICTION),
        prediction_equal=false,
    )


def _step(
    state: BoxParser,
    tokens_T: jax.Array,
    length: jax.Array,
    reference_R: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_think_id: int | jax.Array,
    *,
    reading: str,
) -> BoxParser:
    """Read the next byte of one rollout. A token without bytes also takes one step, since it may be the marker."""
    token = tokens_T[state.token]
    size = jnp.where((token >= 0) & (token < vocab_lengths_V.shape[0]), vocab_lengths_V[token], 0)
    byte = vocab_bytes_VxX[token, state.offset].astype(jnp.int32)
    # Rollouts that have ended wait for the longest one. Their index would clamp to the last token and repeat it.
    live = state.token < length

    has_byte = live & (state.offset < size)
    read = _select(has_byte, _read_byte(state, byte, reference_R, reading), state)
    # An end_think_id of -1 means that there is no such token, not that the token with id -1 is one.
    special = live & (token >= 0) & (token == end_think_id)
    marker = special | (read.think_matched == len(_END_THINK))
    read = _select(marker, _start_answer(read), read)

    more = live & (state.offset + 1 < size)
    if state.first_token is not None:
        opens = has_byte & (read.size == 0)
        starts = has_byte & (state.size == 0) & (state.offset == 0)
        first_token = jnp.where(starts, state.token, state.first_token)
        read = read._replace(first_token=jnp.where(opens, -1, first_token))
    return read._replace(
        token=jnp.where(more | ~live, state.token, state.token + 1),
        offset=jnp.where(more, state.offset + 1, 0),
    )


def _read_byte(state: BoxParser, byte: jax.Array, reference_R: jax.Array, reading: str) -> BoxParser:
    """Return the state after one more byte."""
    think_matched = _matched_bytes(_END_THINK, state.think_matched, byte)
    box_matched = jnp.where(state.answering, _matched_bytes(_BOX, state.box_matched, byte), 0)
    opens = box_matched == len(_BOX)

    if reading == "to_end":
        # The box stays open. A `}` ends the prediction unless another byte follows.
        ends = (byte == _CLOSE) & (state.depth > 0)
        depth = state.depth
        earlier_size = jnp.full_like(state.prediction_size, NO_PREDICTION)
    else:
        # Before the balancing brace, any `}` may turn out to be the last one, so the latest one ends the prediction. This
        # makes the balanced reading and the fallback a single rule. `\boxed{}}` has a second brace after the balancing one.
        closed_empty = (state.prediction_size == 0) & (state.size == 1)
        ends = (byte == _CLOSE) & ((state.depth > 0) | closed_empty)
        nesting = (byte == _OPEN).astype(jnp.int32) - (byte == _CLOSE).astype(jnp.int32)
        depth = state.depth + jnp.where((state.depth > 0) & ~state.escaped, nesting, 0)
        earlier_size = state.prediction_size
    # The index clamps past the end of the reference. The result is then ignored: such a prediction is longer than the
    # reference.
    equal = state.equal & (byte == reference_R[state.size])
    prediction_size = jnp.where(ends, state.size, earlier_size)

    if state.equal_size is not None:
        # `equal` stays false after the first byte that differs. Past the end of the reference, callers cap the size.
        grown = jnp.where(equal, state.size + 1, state.equal_size)
        state = state._replace(equal_size=jnp.where(opens, 0, grown))
    return state._replace(
        think_matched=think_matched,
        box_matched=jnp.where(opens, 0, box_matched),
        escaped=(byte == _BACKSLASH) & ~state.escaped,
        depth=jnp.where(opens, 1, depth),
        size=jnp.where(opens, 0, state.size + 1),
        equal=opens | equal,
        prediction_size=jnp.where(opens, NO_PREDICTION, prediction_size),
        prediction_equal=jnp.where(ends, state.equal, state.prediction_equal),
    )


def _start_answer(state: BoxParser) -> BoxParser:
    """Return the state at the start of the answer, right after an end-of-thinking marker.

    Partial matches are dropped. `</think>` contains no start of a box, so this can only drop a box that the special
    token splits.
    """
    return state._replace(
        think_matched=jnp.zeros_like(state.think_matched),
        box_matched=jnp.zeros_like(state.box_matched),
        answering=jnp.ones_like(state.answering),
        depth=jnp.zeros_like(state.depth),
        prediction_size=jnp.full_like(state.prediction_size, NO_PREDICTION),
    )


def _matched_bytes(pattern: bytes, matched: jax.Array, byte: jax.Array) -> jax.Array:
    """Return how many bytes of `pattern` the input ends with after `byte`, given that number before it.

    Only exact for a pattern whose first byte occurs nowhere else in it: after a mismatch at most that byte can match.
    """
    restart = (byte == pattern[0]).astype(jnp.int32)
    return jnp.where(byte == jnp.array(list(pattern))[matched], matched + 1, restart)


def _select(condition: jax.Array, chosen: BoxParser, otherwise: BoxParser) -> BoxParser:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), chosen, otherwise)


def _first_relevant_token(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_think_id: int | jax.Array,
) -> jax.Array:
    """Return the index of a token of every response before which nothing can change the result, int32 [P, G].

    With a special marker, this is a token shortly before the last one, where the parser resets. Without one, the
    response can only contain the marker as bytes, and these start at the earliest at its first `<`.
    """
    length = tokens_PxGxT.shape[-1]
    index_T = jnp.arange(length, dtype=jnp.int32)
    special_PxGxT = (tokens_PxGxT == end_think_id) & (end_think_id >= 0) & (index_T < lengths_PxG[..., None])
    # Only the block of the last marker is located: on a CPU this takes a fifth of the time of finding its exact index.
    block = math.gcd(length, _MARKER_BLOCK)
    special_PxGxB = special_PxGxT.reshape(*lengths_PxG.shape, length // block, block).any(axis=-1)
    last_PxG = jnp.max(jnp.where(special_PxGxB, jnp.arange(0, length, block, dtype=jnp.int32), -1), axis=-1)

    def first_token_with_marker_byte() -> jax.Array:
        # Computed inside the branch: an array that a branch captures is materialized even when the branch does not run.
        live_PxGxT = index_T < lengths_PxG[..., None]
        real_VxX = jnp.arange(vocab_bytes_VxX.shape[1]) < vocab_lengths_V[:, None]
        begins_V = jnp.any((vocab_bytes_VxX == _END_THINK[0]) & real_VxX, axis=1)
        known_PxGxT = live_PxGxT & (tokens_PxGxT >= 0) & (tokens_PxGxT < vocab_lengths_V.shape[0])
        return jnp.min(jnp.where(known_PxGxT & begins_V[tokens_PxGxT], index_T, length), axis=-1)

    # Looking up every token costs more than the rest of the parser, and few batches need it.
    in_bytes_PxG = jax.lax.cond(
        jnp.any((last_PxG < 0) & (lengths_PxG > 0)),
        first_token_with_marker_byte,
        lambda: jnp.full(lengths_PxG.shape, length, jnp.int32),
    )
    return jnp.where(last_PxG >= 0, last_PxG, in_bytes_PxG)
