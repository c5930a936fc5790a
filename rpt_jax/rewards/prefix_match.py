"""The prefix-matching reward (paper, section 3.2, Equation 3): read the boxed prediction, compare it with the text.

Everything happens on the raw bytes of tokens, inside one compiled program. Decoding to text and encoding again would
change the lengths of characters that a token border cuts in two, and with them the boundaries.

The reading rule, where the paper says only "the last \\boxed{} following the special token '</think>'":

* The answer begins after the last end-of-thinking marker: the special token, or the bytes `</think>`.
* The prediction is what the last `\\boxed{` of the answer holds, up to its balancing brace. A brace behind an odd
  run of backslashes does not count. If nothing balances, the prediction runs up to the last `}` of the response.
* `\\boxed{}}` reads as `}`. Nothing is stripped.

A response is read as a stream, one byte of every rollout per step, by a parser whose state is a few scalars. So
memory does not depend on the longest token of the vocabulary. Reading begins where the answer may begin, in the block
of the last special token, and the number of steps is the longest answer in bytes (a token without bytes counts as one).
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_THINK_END = b"</think>"
_BOX = b"\\boxed{"
_BACKSLASH, _OPEN, _CLOSE = b"\\{}"
_NO_PREDICTION = -1
_BLOCK = 16  # Tokens in which a special token is looked for at one time.


class Status(enum.IntEnum):
    """Why a rollout earned what it earned."""

    CORRECT = 0
    """The prediction is one or more whole tokens of the true continuation: the only status with reward 1."""
    WRONG_BYTES = 1
    """The prediction differs from the continuation, or is longer than what is stored of it."""
    INSIDE_TOKEN = 2
    """The bytes are those of the continuation, but they end inside one of its tokens."""
    EMPTY = 3
    """The box holds nothing."""
    NO_BOX = 4
    """No end-of-thinking marker, no box after it, or a box without any closing brace."""
    NOT_FINISHED = 5
    """The length limit ended the response, whatever it holds."""


class _Parser(NamedTuple):
    """What is known of one rollout after some of its bytes. Scalars; `vmap` adds the axes [P,G]."""

    token: jax.Array  # int32: the token being read,
    offset: jax.Array  # int32: and the next of its bytes.
    think_matched: jax.Array  # int32: how many bytes of `</think>` the stream ends with.
    box_matched: jax.Array  # int32: the same for `\boxed{`, counted within the answer.
    answering: jax.Array  # bool: a marker has been seen.
    escaped: jax.Array  # bool: the stream ends with an odd run of backslashes.
    depth: jax.Array  # int32: open braces of the last box; 0 when it is closed, or when there is none.
    size: jax.Array  # int32: bytes since the last box opened,
    equal: jax.Array  # bool: and whether all of them are the reference's.
    prediction_size: jax.Array  # int32: `size` before the brace that ends the prediction, as far as one can tell,
    prediction_equal: jax.Array  # bool: and `equal` there.
    start: jax.Array | None = None  # int32: the token that the last box begins with, -1 where none begins there.


def _start() -> _Parser:
    zero, false = jnp.int32(0), jnp.bool_(False)
    return _Parser(
        token=zero,
        offset=zero,
        think_matched=zero,
        box_matched=zero,
        answering=false,
        escaped=false,
        depth=zero,
        size=zero,
        equal=false,
        prediction_size=jnp.int32(_NO_PREDICTION),
        prediction_equal=false,
    )


def _matched(pattern: bytes, matched: jax.Array, byte: jax.Array) -> jax.Array:
    """Return how many bytes of `pattern` the stream ends with after `byte`, given the number before it.

    Exact only for a pattern whose first byte does not occur in it again: a mismatch then leaves at most that byte.
    """
    restart = (byte == pattern[0]).astype(jnp.int32)
    return jnp.where(byte == jnp.array(list(pattern))[matched], matched + 1, restart)


def _consume(state: _Parser, byte: jax.Array, reference_R: jax.Array) -> _Parser:
    """Take one byte of the response."""
    think_matched = _matched(_THINK_END, state.think_matched, byte)
    box_matched = jnp.where(state.answering, _matched(_BOX, state.box_matched, byte), 0)
    opens = box_matched == len(_BOX)

    # Up to the balancing brace each `}` may turn out to be the last, so the latest one ends the prediction: the
    # balanced reading and the fallback are one rule. `\boxed{}}` has a second brace after the balancing one.
    closed_empty = (state.prediction_size == 0) & (state.size == 1)
    ends = (byte == _CLOSE) & ((state.depth > 0) | closed_empty)
    nesting = (byte == _OPEN).astype(jnp.int32) - (byte == _CLOSE).astype(jnp.int32)
    depth = state.depth + jnp.where((state.depth > 0) & ~state.escaped, nesting, 0)
    equal = state.equal & (byte == reference_R[state.size])  # Past the end, where this means nothing, `_judge` says no.
    prediction_size = jnp.where(ends, state.size, state.prediction_size)

    return state._replace(
        think_matched=think_matched,
        box_matched=jnp.where(opens, 0, box_matched),
        escaped=(byte == _BACKSLASH) & ~state.escaped,
        depth=jnp.where(opens, 1, depth),
        size=jnp.where(opens, 0, state.size + 1),
        equal=opens | equal,
        prediction_size=jnp.where(opens, _NO_PREDICTION, prediction_size),
        prediction_equal=jnp.where(ends, state.equal, state.prediction_equal),
    )


def _end_thinking(state: _Parser) -> _Parser:
    """Begin the answer. No box begins within `</think>`, so one that the special token interrupts may be forgotten."""
    return state._replace(
        think_matched=jnp.zeros_like(state.think_matched),
        box_matched=jnp.zeros_like(state.box_matched),
        answering=jnp.ones_like(state.answering),
        depth=jnp.zeros_like(state.depth),
        prediction_size=jnp.full_like(state.prediction_size, _NO_PREDICTION),
    )


def _select(condition: jax.Array, chosen: _Parser, otherwise: _Parser) -> _Parser:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), chosen, otherwise)


def _step(
    state: _Parser,
    tokens_T: jax.Array,
    length: jax.Array,
    reference_R: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_of_thinking_id: jax.Array,
) -> _Parser:
    """Read the next byte of one rollout. A token without bytes takes a step too: it may be the marker."""
    token = tokens_T[state.token]
    size = jnp.where((token >= 0) & (token < vocab_lengths_V.shape[0]), vocab_lengths_V[token], 0)
    byte = vocab_bytes_VxX[token, state.offset].astype(jnp.int32)
    live = state.token < length  # While others read on; past the end an index would repeat the last token.

    read = _select(live & (state.offset < size), _consume(state, byte, reference_R), state)
    special = live & (token >= 0) & (token == end_of_thinking_id)  # -1 is no token, not one whose id is -1.
    marker = special | (read.think_matched == len(_THINK_END))
    read = _select(marker, _end_thinking(read), read)

    more = live & (state.offset + 1 < size)
    if state.start is not None:
        opens = live & (state.offset < size) & (read.size == 0)
        read = read._replace(start=jnp.where(opens, jnp.where(more, -1, state.token + 1), state.start))
    return read._replace(
        token=jnp.where(more | ~live, state.token, state.token + 1),
        offset=jnp.where(more, state.offset + 1, 0),
    )


class BoxReader(NamedTuple):
    """How far the box in each of M unfinished responses has been read, a token at a time.

    Attributes:
      closed: bool, the answer's box is closed: by the brace that balances it, and `\\boxed{}` only once it is clear that its
        brace is not what it holds.
    """

    parser: _Parser
    closed: jax.Array

    @classmethod
    def start(cls, rows: int) -> BoxReader:
        """Nothing read yet of `rows` responses."""
        parser = jax.tree.map(lambda x: jnp.full((rows,), x), _start())
        return cls(parser, jnp.zeros(rows, bool))


def read_box(
    reader: BoxReader, token_M: jax.Array, bytes_VxX: jax.Array, lengths_V: jax.Array, end_of_thinking_id: int
) -> BoxReader:
    """Read one more token of each response."""

    def one(state: _Parser, token: jax.Array) -> _Parser:
        ignored_R = jnp.zeros(1, jnp.int32)  # There is nothing to compare with.
        args = token[None], jnp.int32(1), ignored_R, bytes_VxX, lengths_V, end_of_thinking_id
        begin = state._replace(token=jnp.int32(0), offset=jnp.int32(0))
        return jax.lax.while_loop(lambda s: s.token < 1, lambda s: _step(s, *args), begin)

    parser = jax.vmap(one)(reader.parser, token_M)
    undecided = (parser.prediction_size == 0) & (parser.size == 1)
    return BoxReader(parser, (parser.depth == 0) & (parser.prediction_size >= 0) & ~undecided)


def _judge(state: _Parser, stopped: jax.Array, boundaries_Rp1: jax.Array) -> jax.Array:
    """Return the status of one rollout that has been read to its end."""
    size = state.prediction_size
    stored = jnp.max(jnp.where(boundaries_Rp1, jnp.arange(boundaries_Rp1.shape[0]), 0))
    prefix = state.prediction_equal & (size <= stored)
    return jnp.select(
        [~stopped, size == _NO_PREDICTION, size == 0, prefix & boundaries_Rp1[size], prefix],
        [Status.NOT_FINISHED, Status.NO_BOX, Status.EMPTY, Status.CORRECT, Status.INSIDE_TOKEN],
        Status.WRONG_BYTES,
    ).astype(jnp.int32)


@jax.jit
def prefix_match_reward(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    stopped_PxG: jax.Array,
    reference_PxR: jax.Array,
    boundaries_PxRp1: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_of_thinking_id: int | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the reward and the `Status` of every rollout (paper, Equation 3; the reading rule is the module's).

    The reward is 1 where the predicted bytes equal the first bytes of the true continuation and end where one of its
    tokens ends, else 0. No more of the continuation counts than what is stored up to its last boundary: a longer
    prediction is `WRONG_BYTES`.

    Args:
        tokens_PxGxT: int32 response tokens; those at and after a rollout's length are never looked at.
        lengths_PxG: int32 response tokens including the stop token, 0 to T.
        stopped_PxG: bool, False where the length limit ended the response.
        reference_PxR: uint8 bytes of the true continuation; those after the last boundary are padding.
        boundaries_PxRp1: bool, True at the cumulative token ends of the continuation, False at 0.
        vocab_bytes_VxX: uint8 raw bytes of every token; those after its length are padding.
        vocab_lengths_V: int32 bytes of every token, 0 for special ones. An id outside the table has no bytes.
        end_of_thinking_id: id of the end-of-thinking special token, or -1 where the tokenizer has none.

    Returns:
        reward_PxG (float32, 0 or 1) and status_PxG (int32).
    """
    responses = tokens_PxGxT, lengths_PxG, stopped_PxG, reference_PxR
    state_PxG = _read(_start(), *responses, vocab_bytes_VxX, vocab_lengths_V, end_of_thinking_id)
    judge_PxG = jax.vmap(jax.vmap(_judge, in_axes=(0, 0, None)))
    status_PxG = judge_PxG(state_PxG, stopped_PxG, boundaries_PxRp1)
    return (status_PxG == Status.CORRECT).astype(jnp.float32), status_PxG


@jax.jit
def predicted_first_token(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    stopped_PxG: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_of_thinking_id: int | jax.Array,
) -> jax.Array:
    """Return the first token of every prediction, as the response has it: int32 [P, G], the y[0] of the paper's Appendix A.

    -1 where a response is not finished, predicts nothing, or has no token that begins with the box and ends within it. The
    arguments are those of `prefix_match_reward`.
    """
    nothing_Px1 = jnp.zeros((tokens_PxGxT.shape[0], 1), jnp.uint8)
    responses = tokens_PxGxT, lengths_PxG, stopped_PxG, nothing_Px1
    start = _start()._replace(start=jnp.int32(-1))
    state_PxG = _read(start, *responses, vocab_bytes_VxX, vocab_lengths_V, end_of_thinking_id)
    at_PxGx1 = jnp.clip(state_PxG.start, 0, tokens_PxGxT.shape[-1] - 1)[..., None]
    first_PxG = jnp.take_along_axis(tokens_PxGxT, at_PxGx1, axis=-1)[..., 0]
    known_PxG = (first_PxG >= 0) & (first_PxG < vocab_lengths_V.shape[0])
    size_PxG = jnp.where(known_PxG, vocab_lengths_V[first_PxG], 0)
    within_PxG = (state_PxG.start >= 0) & (size_PxG > 0) & (size_PxG <= state_PxG.prediction_size)
    return jnp.where(stopped_PxG & within_PxG, first_PxG, -1)


@jax.named_scope("read_box")
def _read(
    start: _Parser,
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    stopped_PxG: jax.Array,
    reference_PxR: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_of_thinking_id: int | jax.Array,
) -> _Parser:
    """Read every finished response to its end; of the others nothing is asked."""
    lengths_PxG = jnp.where(stopped_PxG, lengths_PxG, 0)
    vocab = vocab_bytes_VxX, vocab_lengths_V, end_of_thinking_id
    start_PxG = jax.tree.map(lambda x: jnp.broadcast_to(x, lengths_PxG.shape), start)
    start_PxG = start_PxG._replace(token=_first_to_read(tokens_PxGxT, lengths_PxG, *vocab))
    step_G = jax.vmap(_step, in_axes=(0, 0, 0, None, None, None, None))
    step_PxG = jax.vmap(step_G, in_axes=(0, 0, 0, 0, None, None, None))
    return jax.lax.while_loop(
        lambda state: jnp.any(state.token < lengths_PxG),
        lambda state: step_PxG(state, tokens_PxGxT, lengths_PxG, reference_PxR, *vocab),
        start_PxG,
    )


def _first_to_read(
    tokens_PxGxT: jax.Array,
    lengths_PxG: jax.Array,
    vocab_bytes_VxX: jax.Array,
    vocab_lengths_V: jax.Array,
    end_of_thinking_id: int | jax.Array,
) -> jax.Array:
    """Return a token of every response before which nothing can matter, int32 [P, G].

    That is one shortly before the last special marker, where the parser forgets what came before. A response without one can
    only spell it, and not before its first `<`.
    """
    length = tokens_PxGxT.shape[-1]
    places_T = jnp.arange(length, dtype=jnp.int32)
    special_PxGxT = (
        (tokens_PxGxT == end_of_thinking_id) & (end_of_thinking_id >= 0) & (places_T < lengths_PxG[..., None])
    )
    # To a block: a CPU finds out whether a block holds one in a fifth of the time that it takes for the last one's place.
    block = math.gcd(length, _BLOCK)
    special_PxGxB = special_PxGxT.reshape(*lengths_PxG.shape, length // block, block).any(axis=-1)
    last_PxG = jnp.max(jnp.where(special_PxGxB, jnp.arange(0, length, block, dtype=jnp.int32), -1), axis=-1)

    def first_that_may_spell() -> jax.Array:
        # Formed in here: what a branch takes from outside is in memory whether it runs or not.
        live_PxGxT = places_T < lengths_PxG[..., None]
        real_VxX = jnp.arange(vocab_bytes_VxX.shape[1]) < vocab_lengths_V[:, None]
        begins_V = jnp.any((vocab_bytes_VxX == _THINK_END[0]) & real_VxX, axis=1)
        known_PxGxT = live_PxGxT & (tokens_PxGxT >= 0) & (tokens_PxGxT < vocab_lengths_V.shape[0])
        return jnp.min(jnp.where(known_PxGxT & begins_V[tokens_PxGxT], places_T, length), axis=-1)

    # Looking every token up takes longer than all the rest, and hardly a batch needs it.
    spelt_PxG = jax.lax.cond(
        jnp.any((last_PxG < 0) & (lengths_PxG > 0)),
        first_that_may_spell,
        lambda: jnp.full(lengths_PxG.shape, length, jnp.int32),
    )
    return jnp.where(last_PxG >= 0, last_PxG, spelt_PxG)
