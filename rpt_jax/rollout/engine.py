"""The loop that decodes: a fixed number of slots for any number of rollouts, in one program on the device.

A rollout that ends frees its slot, and the next one of the queue begins there, without the host. When the queue is empty, the
live rollouts are moved together into ever smaller batches.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.objective.logprobs import chosen_logprobs, scaled_logits
from rpt_jax.policy.attention import KeyValues
from rpt_jax.policy.transformer import Params, Transformer, head
from rpt_jax.rollout.decode import decode_token, split_layers
from rpt_jax.rollout.kv_cache import Blocks, Shared, block_size, empty_ring, look_at
from rpt_jax.rollout.prefill import Prompts, prefill_prompts
from rpt_jax.rollout.sampling import rollout_keys, sample_tokens, uniform_at

# Each size of the live batch is a compiled program; the last ones matter where few long responses outlast the others.
_SHRINK, _SMALLEST = (2, 4, 8, 32), 8


class Rollouts(NamedTuple):
    """G sampled responses to each of P prompts.

    Attributes:
      tokens_PxGxT: int32 ids; after `lengths` zeros.
      lengths_PxG: int32 number of response tokens, the stop token included.
      logprobs_PxGxT: float32 log-probability of each token at the sampling temperature, zero after `lengths`.
      stopped_PxG: bool, True where a stop token ended the response and False where the length limit did.
    """

    tokens_PxGxT: jax.Array
    lengths_PxG: jax.Array
    logprobs_PxGxT: jax.Array
    stopped_PxG: jax.Array

    @property
    def mask_PxGxT(self) -> jax.Array:
        """True for response tokens, up to and including the stop token."""
        return jnp.arange(self.tokens_PxGxT.shape[-1]) < self.lengths_PxG[..., None]


class Decoding(NamedTuple):
    """How rollouts are sampled; `slots` and `chunk` bound memory and do not change the result.

    Attributes:
      samples: G.
      max_new_tokens: T, the length limit.
      temperature: above 0.
      stop_ids: tokens that end a response; none, and every response is T long.
      slots: rollouts that are live at once.
      chunk: tokens of a prompt that are prefilled at one time.
    """

    samples: int
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    slots: int = 256
    chunk: int = 512


class _Live(NamedTuple):
    """The rollouts that are being decoded, one in each of M slots, and what all R = P·G have come to.

    Attributes:
      step: decode steps so far.
      next: how many of the queue have begun.
      rollout_M: int32 index p·G + g; R where the slot is idle.
      token_M: the last token, which has not been run yet; count_M: tokens so far, that one included.
      own: keys of the rollouts' own tokens, and new, [L, M, K, 1, 1, C], those of the last one: written at the beginning of
        the next step, before anything is read. Written after, XLA copies the whole cache every step.
      rollouts: of R, flat.
    """

    step: jax.Array
    next: jax.Array
    rollout_M: jax.Array
    token_M: jax.Array
    count_M: jax.Array
    own: Blocks
    new: KeyValues
    rollouts: Rollouts

    @property
    def running_M(self) -> jax.Array:
        return self.rollout_M < self.rollouts.lengths_PxG.shape[0]


def decode_all(
    policy: Transformer, params: Params, prompts: Prompts, key: jax.Array, decoding: Decoding
) -> tuple[Rollouts, jax.Array]:
    """Sample G responses to each of P = N·J prompts, on one replica.

    Returns: the rollouts, and int32 [1, sizes] decode steps in each of `live_sizes`.
    """
    shared, start, queue, total, prompt_lengths_R, keys_R = _begin(policy, params, prompts, key, decoding)
    params = split_layers(policy, params)
    live, work, flat = start, [], False
    sizes = live_sizes(decoding.slots, start.rollouts.lengths_PxG.shape[0])
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < live.rollout_M.shape[0]:
            slots = jnp.argsort(~live.running_M, stable=True)[:size]
            rows = shared[0].end_NxW.shape[0]
            if flat or size <= rows:
                places = slots if flat else live.rollout_M[slots]
                shared, flat = tuple(part.spread(places) for part in shared), True
            live = _move(live, slots)
        refill = size == sizes[0]

        def go_on(live: _Live, smaller: int = smaller, refill: bool = refill) -> jax.Array:
            pending = (live.next < total) if refill else False
            return pending | (live.running_M.sum() > smaller)

        def step(live: _Live, shared: tuple[Shared, ...] = shared, flat: bool = flat, refill: bool = refill) -> _Live:
            live, ended_M = _decode(policy, params, decoding, live, shared, flat, prompt_lengths_R, keys_R)
            return _refill(live, ended_M, queue, total) if refill else _idle(live, ended_M)

        before = live.step
        live = jax.lax.while_loop(go_on, step, live)
        work.append(live.step - before)
    shape = *prompts.ids_NxJ.reshape(-1).shape, decoding.samples
    rollouts = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), live.rollouts)
    return rollouts, jnp.stack(work)[None]


def live_sizes(slots: int, rollouts: int) -> list[int]:
    """Sizes that the live batch shrinks through."""
    size = min(slots, rollouts)
    return [size, *(size // factor for factor in _SHRINK if size // factor >= _SMALLEST)]


def _begin(policy: Transformer, params: Params, prompts: Prompts, key: jax.Array, decoding: Decoding):
    """Prefill, draw every rollout's first token, and fill the slots."""
    samples, limit = decoding.samples, decoding.max_new_tokens
    longest = max(prompts.roots_NxS.shape[1], limit)
    block = block_size(jax.default_backend(), longest)
    shared, kv, hidden_NxJxD = prefill_prompts(policy, params, prompts, samples, decoding.chunk, block)
    flat_ids = prompts.ids_NxJ.reshape(-1)
    keys_R = rollout_keys(key, flat_ids, samples).reshape(-1)
    count = keys_R.shape[0]
    lengths_R = jnp.repeat(prompts.lengths_NxJ.reshape(-1), samples)

    # All samples of a prompt draw their first token from the same distribution.
    logits_PxV = scaled_logits(
        head(policy, params), hidden_NxJxD.reshape(-1, hidden_NxJxD.shape[-1]), decoding.temperature
    )
    uniform = uniform_at(keys_R, jnp.zeros(count, jnp.int32)).reshape(-1, samples)
    token_PxG = jax.vmap(sample_tokens, in_axes=(None, 1), out_axes=1)(logits_PxV, uniform)
    logprob_PxG = jax.vmap(chosen_logprobs, in_axes=(None, 1), out_axes=1)(logits_PxV, token_PxG)
    exists_R = jnp.repeat(flat_ids >= 0, samples)
    token_R, logprob_R = jnp.where(exists_R, token_PxG.reshape(-1), 0), jnp.where(exists_R, logprob_PxG.reshape(-1), 0)
    stopped_R = _is_stop(token_R, decoding.stop_ids) & exists_R
    rollouts = Rollouts(
        tokens_PxGxT=jnp.zeros((count, limit), jnp.int32).at[:, 0].set(token_R),
        lengths_PxG=exists_R.astype(jnp.int32),
        logprobs_PxGxT=jnp.zeros((count, limit), jnp.float32).at[:, 0].set(logprob_R),
        stopped_PxG=stopped_R,
    )
    waits_R = exists_R & ~stopped_R & (limit > 1)
    queue = jnp.argsort(~waits_R, stable=True)
    slots = min(decoding.slots, count)
    idle = jnp.full(slots, count, jnp.int32)
    own = empty_ring(kv, slots, max(limit - 1, 1), block_size(jax.default_backend(), limit))
    new = jax.tree.map(lambda x: jnp.zeros((x.shape[0], slots, x.shape[2], 1, 1, x.shape[-1]), x.dtype), kv)
    live = _Live(jnp.int32(0), jnp.int32(0), idle, jnp.zeros_like(idle), jnp.zeros_like(idle), own, new, rollouts)
    live = _refill(live, jnp.ones(slots, bool), queue, waits_R.sum())
    return shared, live, queue, waits_R.sum(), lengths_R, keys_R


def _is_stop(tokens: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.array(stop_ids, jnp.int32))


def _decode(
    policy: Transformer,
    params: Params,
    decoding: Decoding,
    live: _Live,
    shared: tuple[Shared, ...],
    flat: bool,
    prompt_lengths_R: jax.Array,
    keys_R: jax.Array,
) -> tuple[_Live, jax.Array]:
    """Run the last token of every live rollout and draw its next one; return also which of the rollouts end with it."""
    places = jnp.arange(live.rollout_M.shape[0], dtype=jnp.int32) if flat else live.rollout_M
    running = live.running_M
    # Idle slots would make everyone read what they once wrote.
    behind = jnp.where(running, live.count_M - 1, 0)
    own = live.own.write(live.new, live.step - 1)
    look = look_at(shared, jnp.where(running, places, 2**30), own, live.step, behind)
    positions = prompt_lengths_R.at[live.rollout_M].get(mode="clip") + behind
    hidden_MxD, new = decode_token(policy, params, live.token_M, positions, look)
    logits_MxV = scaled_logits(head(policy, params), hidden_MxD, decoding.temperature)
    keys_M = keys_R.at[live.rollout_M].get(mode="clip")
    token_M = sample_tokens(logits_MxV, uniform_at(keys_M, live.count_M))
    logprob_M = chosen_logprobs(logits_MxV, token_M)

    count_M, stopped_M = live.count_M + 1, _is_stop(token_M, decoding.stop_ids)
    at, old = live.rollout_M, live.rollouts
    rollouts = Rollouts(
        tokens_PxGxT=old.tokens_PxGxT.at[at, live.count_M].set(token_M, mode="drop"),
        lengths_PxG=old.lengths_PxG.at[at].set(count_M, mode="drop"),
        logprobs_PxGxT=old.logprobs_PxGxT.at[at, live.count_M].set(logprob_M, mode="drop"),
        stopped_PxG=old.stopped_PxG.at[at].set(stopped_M, mode="drop"),
    )
    ended_M = stopped_M | (count_M >= decoding.max_new_tokens) | ~running
    step = live.step + 1
    live = live._replace(step=step, token_M=token_M, count_M=count_M, own=own, new=new, rollouts=rollouts)
    return live, ended_M


def _refill(live: _Live, ended_M: jax.Array, queue: jax.Array, total: jax.Array) -> _Live:
    """Begin the next rollouts of the queue where others have ended."""
    turn_M = live.next + jnp.cumsum(ended_M) - 1
    fresh_M = jnp.where(turn_M < total, queue[turn_M % len(queue)], len(queue))
    rollout_M = jnp.where(ended_M, fresh_M, live.rollout_M).astype(jnp.int32)
    first_M = live.rollouts.tokens_PxGxT[:, 0].at[rollout_M].get(mode="clip")
    return live._replace(
        next=jnp.minimum(live.next + ended_M.sum(), total).astype(jnp.int32),
        rollout_M=rollout_M,
        token_M=jnp.where(ended_M, first_M, live.token_M),
        count_M=jnp.where(ended_M, 1, live.count_M),
    )


def _idle(live: _Live, ended_M: jax.Array) -> _Live:
    return live._replace(rollout_M=jnp.where(ended_M, live.rollouts.lengths_PxG.shape[0], live.rollout_M))


def _move(live: _Live, slots: jax.Array) -> _Live:
    """Keep the rollouts of `slots` only."""
    return live._replace(
        rollout_M=live.rollout_M[slots],
        token_M=live.token_M[slots],
        count_M=live.count_M[slots],
        own=live.own.take(slots),
        new=jax.tree.map(lambda x: x[:, slots], live.new),
    )
