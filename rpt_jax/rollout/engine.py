"""The loop that decodes: a fixed number of slots for any number of rollouts, in one program on the device.

A rollout that ends frees its slot, and the next one of the queue begins there, without the host. When the queue is empty, the
live rollouts are moved together into ever smaller batches.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.dispatch import KeyValues
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.transformer import Head, Params, Transformer, head
from rpt_jax.objective.logprobs import chosen_logprobs, scaled_logits
from rpt_jax.rewards.prefix_match import BoxReader, read_box
from rpt_jax.rollout.decode import decode_head, decode_token, lay_out
from rpt_jax.rollout.kv_cache import Blocks, Shared, block_size, empty_ring, look_at
from rpt_jax.rollout.prefill import prefill_prompts
from rpt_jax.rollout.prefix_sharing import Prompts
from rpt_jax.rollout.sampling import sample_tokens, truncate, uniform_noise

# Sizes that the live batch shrinks through, in 32nds of the first. Each is compiled for; the last ones matter where few long
# responses outlast the others.
_SHRINK, _SMALLEST = (24, 16, 12, 8, 6, 4, 2, 1), 8
_NOWHERE = 2**30  # An index out of every range.


class Ended(enum.IntEnum):
    """Why a response ended."""

    LENGTH = 0
    STOP = 1
    """With one of the stop tokens."""
    BOX = 2
    """With the brace that closes the box, after thinking has ended."""


class Rollouts(NamedTuple):
    """G sampled responses to each of P prompts.

    Attributes:
      tokens_PxGxT: int32 ids; after `lengths` zeros.
      lengths_PxG: int32 number of response tokens, the last one included.
      logprobs_PxGxT: float32 log-probability of each token under what it was drawn from, zero after `lengths`.
      ended_PxG: int32, one of `Ended`.
    """

    tokens_PxGxT: jax.Array
    lengths_PxG: jax.Array
    logprobs_PxGxT: jax.Array
    ended_PxG: jax.Array

    @property
    def mask_PxGxT(self) -> jax.Array:
        """True for response tokens, up to and including the last one."""
        return jnp.arange(self.tokens_PxGxT.shape[-1]) < self.lengths_PxG[..., None]

    @property
    def stopped_PxG(self) -> jax.Array:
        """False where the length limit ended the response."""
        return self.ended_PxG != Ended.LENGTH


class Work(NamedTuple):
    """What decoding took on each replica: steps [replicas, sizes] in each of `live_sizes`, and slots over all of them."""

    steps: jax.Array
    slots: jax.Array


class Decoding(NamedTuple):
    """How rollouts are sampled; `slots` and `chunk` bound memory and do not change the result.

    Attributes:
      samples: G.
      max_new_tokens: T, the length limit.
      temperature: above 0.
      stop_ids: tokens that end a response; none, and every response is T long.
      top_k, top_p: what a token is drawn from, see `truncate`; 0 and 1: from everything.
      end_think_id: with a vocabulary's bytes, says where a response ends at its box (see `Ended.BOX`).
      slots: rollouts that are live at once, on all replicas together; 0: all.
      chunk: tokens that are prefilled at one time.
    """

    samples: int
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    end_think_id: int = -1
    slots: int = 0
    chunk: int = 4096


class _Live(NamedTuple):
    """The rollouts that are being decoded, one in each of M slots, and what all R = P·G have come to.

    Attributes:
      step: decode steps so far.
      next: how many of the queue have begun.
      rollout_M: int32 index p·G + g; R where the slot is idle.
      token_M: the last token, which has not been run yet; count_M: tokens so far, that one included.
      box_M: how far the box has been read, or None.
      own: keys of the rollouts' own tokens, and new, [L, M, K, 1, 1, C], those of the last one: written at the beginning of
        the next step, before anything is read. Written after, XLA copies the whole cache every step.
      rollouts: of R, flat.
    """

    step: jax.Array
    next: jax.Array
    rollout_M: jax.Array
    token_M: jax.Array
    count_M: jax.Array
    box_M: BoxReader | None
    own: Blocks
    new: KeyValues
    rollouts: Rollouts

    @property
    def running_M(self) -> jax.Array:
        return self.rollout_M < self.rollouts.lengths_PxG.shape[0]

    def take(self, slots: jax.Array) -> _Live:
        """Keep the rollouts of `slots` only."""
        return self._replace(
            rollout_M=self.rollout_M[slots],
            token_M=self.token_M[slots],
            count_M=self.count_M[slots],
            box_M=jax.tree.map(lambda x: x[slots], self.box_M),
            own=self.own.take(slots),
            new=jax.tree.map(lambda x: x[:, slots], self.new),
        )


class _Batch(NamedTuple):
    """What stays as it is while rollouts are decoded.

    Attributes:
      params: as `lay_out` returns them; vocab: the tokens' bytes and lengths, or None.
      shared: what rollouts share, a part each; flat: whether each slot has its own row of each.
      prompt_lengths_R, noise_RxT: of every rollout.
      queue_R: those that need more than their first token, first; total: how many these are.
      boxes_R: how far the box has been read after the first token.
    """

    params: Params
    vocab: tuple[jax.Array, jax.Array] | None
    shared: tuple[Shared, ...]
    flat: bool
    prompt_lengths_R: jax.Array
    noise_RxT: jax.Array
    queue_R: jax.Array
    total: jax.Array
    boxes_R: BoxReader | None


def decode_all(
    policy: Transformer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    vocab: tuple[jax.Array, jax.Array] | None,
    decoding: Decoding,
) -> tuple[Rollouts, Work]:
    """Sample G responses to each of P prompts, on one replica."""
    batch, live = begin(policy, params, prompts, key, vocab, decoding)
    work, sizes = [], live_sizes(decoding.slots, live.rollouts.lengths_PxG.shape[0])
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < sizes[0]:
            slots = jnp.argsort(~live.running_M, stable=True)[:size]
            if batch.flat or size <= len(prompts.ids_P):
                places = [slots if batch.flat else part.place_R[live.rollout_M[slots]] for part in batch.shared]
                shared = tuple(part.spread(place_M) for part, place_M in zip(batch.shared, places, strict=True))
                batch = batch._replace(shared=shared, flat=True)
            live = live.take(slots)
        before = live.step
        live = decode_until(policy, decoding, batch, live, smaller)
        work.append(live.step - before)
    dims = len(prompts.ids_P), decoding.samples
    rollouts = jax.tree.map(lambda x: x.reshape(*dims, *x.shape[1:]), live.rollouts)
    steps = jnp.stack(work)[None]
    return rollouts, Work(steps, steps @ jnp.array(sizes))


def live_sizes(slots: int, rollouts: int) -> list[int]:
    """Sizes that the live batch of a replica shrinks through."""
    size = min(slots or rollouts, rollouts)
    return [size, *(size * part // 32 for part in _SHRINK if size * part // 32 >= _SMALLEST)]


@jax.named_scope("decode_loop")
def decode_until(policy: Transformer, decoding: Decoding, batch: _Batch, live: _Live, running: int) -> _Live:
    """Decode until the queue is empty and no more than `running` rollouts are live."""

    def goes_on(live: _Live) -> jax.Array:
        return (live.next < batch.total) | (live.running_M.sum() > running)

    def step(live: _Live) -> _Live:
        return _refill(*_decode(policy, decoding, batch, live), batch)

    return jax.lax.while_loop(goes_on, step, live)


def begin(
    policy: Transformer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    vocab: tuple[jax.Array, jax.Array] | None,
    decoding: Decoding,
) -> tuple[_Batch, _Live]:
    """Prefill, draw every rollout's first token, and fill the slots."""
    shape, samples, limit = policy.config, decoding.samples, decoding.max_new_tokens
    shared, hidden_PxD = prefill_prompts(policy, params, prompts, samples, decoding.chunk)
    noise_RxT, count = uniform_noise(key, prompts.ids_P, samples, limit), len(prompts.ids_P) * samples
    # All samples of a prompt draw their first token from the same distribution.
    logits_PxV = _logits(head(policy, params), hidden_PxD, decoding)
    uniform_PxG = noise_RxT[:, 0].reshape(-1, samples)
    token_PxG = jax.vmap(sample_tokens, in_axes=(None, 1), out_axes=1)(logits_PxV, uniform_PxG)
    logprob_PxG = jax.vmap(chosen_logprobs, in_axes=(None, 1), out_axes=1)(logits_PxV, token_PxG)
    token_R = token_PxG.reshape(-1)
    boxes_R = None if vocab is None else BoxReader.start(count)
    ended_R, boxes_R = _ends(token_R, boxes_R, vocab, decoding)
    rollouts = Rollouts(
        tokens_PxGxT=jnp.zeros((count, limit), jnp.int32).at[:, 0].set(token_R),
        lengths_PxG=jnp.ones(count, jnp.int32),
        logprobs_PxGxT=jnp.zeros((count, limit), jnp.float32).at[:, 0].set(logprob_PxG.reshape(-1)),
        ended_PxG=ended_R,
    )
    waits_R = (ended_R == Ended.LENGTH) & (limit > 1)
    slots = live_sizes(decoding.slots, count)[0]
    idle_M = jnp.full(slots, count, jnp.int32)
    nothing = jnp.zeros((shape.layers, slots, shape.kv_heads, 1, 1, shape.head_size), policy.dtype)
    new = KeyValues(nothing, nothing)
    live = _Live(
        step=jnp.int32(0),
        next=jnp.int32(0),
        rollout_M=idle_M,
        token_M=idle_M,
        count_M=idle_M,
        box_M=None if vocab is None else BoxReader.start(slots),
        own=empty_ring(new, slots, max(limit - 1, 1), block_size(target_platform(), limit)),
        new=new,
        rollouts=rollouts,
    )
    batch = _Batch(
        params=lay_out(policy, params),
        vocab=vocab,
        shared=shared,
        flat=False,
        prompt_lengths_R=jnp.repeat(prompts.lengths_P, samples),
        noise_RxT=noise_RxT,
        queue_R=jnp.argsort(~waits_R, stable=True),
        total=waits_R.sum(),
        boxes_R=boxes_R,
    )
    return batch, _refill(live, jnp.ones(slots, bool), batch)


def _logits(head: Head, hidden_MxD: jax.Array, decoding: Decoding) -> jax.Array:
    """What tokens are drawn from, float32 [M, V]."""
    logits_MxV = scaled_logits(head, hidden_MxD, decoding.temperature)
    return truncate(logits_MxV, decoding.top_k, decoding.top_p)


def _ends(
    token_M: jax.Array, box_M: BoxReader | None, vocab: tuple[jax.Array, jax.Array] | None, decoding: Decoding
) -> tuple[jax.Array, BoxReader | None]:
    """Why each response ends with the token that was drawn, LENGTH where it does not, and how far its box has been read."""
    is_stop_M = jnp.isin(token_M, jnp.array(decoding.stop_ids, jnp.int32))
    ended_M = jnp.where(is_stop_M, Ended.STOP, Ended.LENGTH).astype(jnp.int32)
    if box_M is None:
        return ended_M, None
    box_M = read_box(box_M, token_M, *vocab, decoding.end_think_id)
    return jnp.where(box_M.closed & ~is_stop_M, Ended.BOX, ended_M).astype(jnp.int32), box_M


def _decode(policy: Transformer, decoding: Decoding, batch: _Batch, live: _Live) -> tuple[_Live, jax.Array]:
    """Run the last token of every live rollout and draw its next one; return also which slots are free after it."""
    running_M, at_M, shared = live.running_M, live.rollout_M, batch.shared
    # Idle slots would make everyone read what they once looked at.
    behind_M = jnp.where(running_M, live.count_M - 1, 0)
    if batch.flat:
        shared = tuple(part._replace(end_NxW=jnp.where(running_M[:, None], part.end_NxW, 0)) for part in shared)
    own = live.own.write(live.new, live.step - 1)
    rollout_M = None if batch.flat else jnp.where(running_M, at_M, _NOWHERE)
    look = look_at(shared, rollout_M, own, live.step, behind_M)
    positions_M = batch.prompt_lengths_R.at[at_M].get(mode="clip") + behind_M
    hidden_MxD, new = decode_token(policy, batch.params, live.token_M, positions_M, look)
    logits_MxV = _logits(decode_head(policy, batch.params), hidden_MxD, decoding)
    token_M = sample_tokens(logits_MxV, batch.noise_RxT.at[at_M, live.count_M].get(mode="clip"))
    ended_M, box_M = _ends(token_M, live.box_M, batch.vocab, decoding)

    old, count_M = live.rollouts, live.count_M + 1
    rollouts = Rollouts(
        tokens_PxGxT=old.tokens_PxGxT.at[at_M, live.count_M].set(token_M, mode="drop"),
        lengths_PxG=old.lengths_PxG.at[at_M].set(count_M, mode="drop"),
        logprobs_PxGxT=old.logprobs_PxGxT.at[at_M, live.count_M].set(chosen_logprobs(logits_MxV, token_M), mode="drop"),
        ended_PxG=old.ended_PxG.at[at_M].set(ended_M, mode="drop"),
    )
    free_M = (ended_M != Ended.LENGTH) | (count_M >= decoding.max_new_tokens) | ~running_M
    step = live.step + 1
    live = live._replace(step=step, token_M=token_M, count_M=count_M, box_M=box_M, own=own, new=new, rollouts=rollouts)
    return live, free_M


def _refill(live: _Live, free_M: jax.Array, batch: _Batch) -> _Live:
    """Begin the next rollouts of the queue in the free slots; where there is none left, they are idle."""
    turn_M, rollouts = live.next + jnp.cumsum(free_M) - 1, batch.queue_R.size
    fresh_M = jnp.where(turn_M < batch.total, batch.queue_R.at[turn_M].get(mode="clip"), rollouts)
    rollout_M = jnp.where(free_M, fresh_M, live.rollout_M).astype(jnp.int32)

    def of_fresh(first_R: jax.Array, x_M: jax.Array) -> jax.Array:
        return jnp.where(free_M, first_R.at[rollout_M].get(mode="clip"), x_M)

    return live._replace(
        next=jnp.minimum(live.next + free_M.sum(), batch.total).astype(jnp.int32),
        rollout_M=rollout_M,
        token_M=of_fresh(live.rollouts.tokens_PxGxT[:, 0], live.token_M),
        count_M=jnp.where(free_M, 1, live.count_M),
        box_M=jax.tree.map(of_fresh, batch.boxes_R, live.box_M),
    )
