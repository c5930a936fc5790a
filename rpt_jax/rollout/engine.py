"""Continuous batching on the device: a fixed number of slots decodes any number of rollouts in one program.

A rollout that ends frees its slot, and the next one in the queue starts there, without the host. When the queue is
empty, the live rollouts are compacted into smaller and smaller batches. Every few steps, a check finds the rollouts that have
ended; what they decoded after their end is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.blocked_cache import BlockedCache
from rpt_jax.model.attention.dispatch import KeyValues, cache_kernel
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.experts import Routing
from rpt_jax.model.transformer import Head, Params, Transformer, head
from rpt_jax.objective.logprobs import scaled_logits
from rpt_jax.rewards.boxed import BoxParser, read_box, start_parsers
from rpt_jax.rollout.decode import decode_head, decode_token, prepare_decode_params
from rpt_jax.rollout.kv_cache import (
    SharedCache,
    cache_layout,
    cached_attention,
    device_kv_heads,
    empty_ring,
    own_block_size,
    shared_reads,
    write_token,
)
from rpt_jax.rollout.prefill import prefill_prompts
from rpt_jax.rollout.prefix_sharing import Prompts
from rpt_jax.rollout.rollouts import DecodeWork, Decoding, Ended, Rollouts
from rpt_jax.rollout.sampling import sample_tokens, truncate, uniform_noise
from rpt_jax.tokenizers.tokenizer import ByteVocab

# Batch sizes that live rollouts are compacted to, in 32nds of the number of slots, and the smallest one. Each size is
# compiled separately. The small ones matter when few long responses outlast the others. Where rollouts wait for a slot, most
# steps have all slots in use, so that fewer sizes serve.
_SHRINK_32NDS = (24, 16, 12, 8, 6, 4, 2, 1)
_SHRINK_32NDS_REFILLED = (8, 2)
_SMALLEST_BATCH = 8
# Decode steps between two checks which rollouts have ended. A GPU's host waits for the result of every check, and launches its
# small operations one by one.
STEPS_PER_CHECK = {"cpu": 1, "gpu": 8, "tpu": 1}
# Bytes of a token, about: the box parser reads that many per token between its own checks, if several tokens are read at once.
_BYTES_PER_TOKEN = 4
_OUT_OF_RANGE = 2**30  # An index beyond every array.


class DecodeState(NamedTuple):
    """State of the decode loop: one rollout in each of M slots, and the results of all R = P·G rollouts.

    Attributes:
      step: int32 number of decode steps so far.
      started: int32 number of rollouts of the queue that were started.
      rollout_M: int32 index p·G + g of the rollout in each slot; R for an idle slot.
      token_M: int32 last token, which has not been run yet.
      count_M: int32 number of response tokens so far, that one included.
      box_M: parser state of each response, or None.
      own: ring buffer of keys and values of the rollouts' own tokens; there may be more rows than slots.
      new: keys and values of the last token that was run, [L, M, K, 1, 1, C]. They are written to `own` at the start of
        the next step, before it is read. Writing after reading would make XLA copy the whole cache in every step.
      rollouts: results, with one axis R in place of [P, G].
    """

    step: jax.Array
    started: jax.Array
    rollout_M: jax.Array
    token_M: jax.Array
    count_M: jax.Array
    box_M: BoxParser | None
    own: BlockedCache
    new: KeyValues
    rollouts: Rollouts

    @property
    def running_M(self) -> jax.Array:
        """True for slots with a rollout."""
        return self.rollout_M < self.rollouts.lengths_PxG.shape[0]

    def take(self, slots: jax.Array) -> DecodeState:
        """Keep only the given slots, in ascending order."""
        return self._replace(
            rollout_M=self.rollout_M[slots],
            token_M=self.token_M[slots],
            count_M=self.count_M[slots],
            box_M=jax.tree.map(lambda x: x[slots], self.box_M),
            own=self.own.move_to_front(slots),
            new=jax.tree.map(lambda x: x[:, slots], self.new),
        )


class DecodeInputs(NamedTuple):
    """What does not change during decoding.

    Attributes:
      params: from `prepare_decode_params`.
      vocab: raw bytes of every token, or None.
      shared: caches that rollouts share.
      unshared: whether the shared caches have a separate row for each slot.
      prompt_lengths_R: int32.
      noise_RxT: float32 uniform numbers.
      queue_R: int32 rollouts, those that need more than their first token first.
      queue_size: int32 number of the latter.
      boxes_R: parser state of each response after its first token, or None.
    """

    params: Params
    vocab: ByteVocab | None
    shared: tuple[SharedCache, ...]
    unshared: bool
    prompt_lengths_R: jax.Array
    noise_RxT: jax.Array
    queue_R: jax.Array
    queue_size: jax.Array
    boxes_R: BoxParser | None


def decode_rollouts(
    policy: Transformer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    vocab: ByteVocab | None,
    decoding: Decoding,
) -> tuple[Rollouts, DecodeWork]:
    """Sample G responses to each of P prompts on one replica; the arguments are those of `generate.sample_rollouts`."""
    inputs, state = start_decoding(policy, params, prompts, key, vocab, decoding)

    # One decode loop for each size of the live batch.
    steps = []
    sizes = live_sizes(decoding.slots, state.rollouts.lengths_PxG.shape[0])
    for size, next_size in zip(sizes, [*sizes[1:], 0], strict=True):
        # Compact: a step costs less with fewer slots. While several live rollouts share each row of a cache, the rows
        # stay; after that, each slot gets a separate row.
        if size < sizes[0]:
            slots = jnp.sort(jnp.argsort(~state.running_M, stable=True)[:size])
            if inputs.unshared:
                shared = tuple(cache.unshare(slots) for cache in inputs.shared)
                inputs = inputs._replace(shared=shared)
            elif size <= len(prompts.ids_P):
                shared = tuple(cache.unshare(cache.index_R[state.rollout_M[slots]]) for cache in inputs.shared)
                inputs = inputs._replace(shared=shared, unshared=True)
            state = state.take(slots)
        # Decode until the remaining rollouts fit in the next size.
        before = state.step
        state = decode_until(policy, decoding, inputs, state, next_size)
        steps.append(state.step - before)

    # Split the axis R into [P, G], and add an axis for the replicas to the work.
    dims = (len(prompts.ids_P), decoding.samples)
    rollouts = jax.tree.map(lambda x: x.reshape(*dims, *x.shape[1:]), state.rollouts)
    steps_1xN = jnp.stack(steps)[None]
    return rollouts, DecodeWork(steps=steps_1xN, slots=steps_1xN @ jnp.array(sizes))


def live_sizes(slots: int, rollouts: int) -> list[int]:
    """Return the batch sizes that the live rollouts of a replica are compacted to, the number of slots first."""
    size = min(slots or rollouts, rollouts)
    shrink_32nds = _SHRINK_32NDS if size == rollouts else _SHRINK_32NDS_REFILLED
    return [size, *(size * n // 32 for n in shrink_32nds if size * n // 32 >= _SMALLEST_BATCH)]


@jax.named_scope("decode_loop")
def decode_until(
    policy: Transformer, decoding: Decoding, inputs: DecodeInputs, state: DecodeState, running: int
) -> DecodeState:
    """Decode until the queue is empty and at most `running` rollouts are live."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.started < inputs.queue_size) | (state.running_M.sum() > running)

    return jax.lax.while_loop(unfinished, lambda state: decode(policy, decoding, inputs, state)[0], state)


def decode(
    policy: Transformer, decoding: Decoding, inputs: DecodeInputs, state: DecodeState
) -> tuple[DecodeState, Sampled]:
    """Decode until the next check, and refill the slots of rollouts that have ended; return also what was sampled."""
    state, sampled = _decode_steps(policy, decoding, inputs, state)
    state, free_M = _store(state, sampled, inputs, decoding)
    return _refill(state, free_M, inputs), sampled


def steps_per_check(decoding: Decoding) -> int:
    """Return the decode steps between two checks which rollouts have ended: at most those of a whole response."""
    steps = decoding.steps_per_check or STEPS_PER_CHECK[target_platform()]
    return max(1, min(steps, decoding.max_new_tokens - 1))


def start_decoding(
    policy: Transformer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    vocab: ByteVocab | None,
    decoding: Decoding,
) -> tuple[DecodeInputs, DecodeState]:
    """Prefill the prompts, sample the first token of every rollout, and fill the slots."""
    config = policy.config
    samples = decoding.samples
    max_new_tokens = decoding.max_new_tokens
    shared, hidden_PxD = prefill_prompts(policy, params, prompts, samples, decoding.prefill_tokens)
    noise_RxT = uniform_noise(key, prompts.ids_P, samples, max_new_tokens)
    count = len(prompts.ids_P) * samples

    # The first tokens: all samples of a prompt are drawn from the same distribution.
    logits_PxV = _sampling_logits(head(policy, params), hidden_PxD, decoding)
    uniform_PxG = noise_RxT[:, 0].reshape(-1, samples)
    token_PxG, logprob_PxG = jax.vmap(sample_tokens, in_axes=(None, 1), out_axes=1)(logits_PxV, uniform_PxG)
    token_R = token_PxG.reshape(-1)
    boxes_R = None if vocab is None else start_parsers(count, answering=decoding.answers)
    ended_1xR, boxes_R = _check_end(token_R[None], boxes_R, vocab, decoding)
    rollouts = Rollouts(
        tokens_PxGxT=jnp.zeros((count, max_new_tokens), jnp.int32).at[:, 0].set(token_R),
        lengths_PxG=jnp.ones(count, jnp.int32),
        logprobs_PxGxT=jnp.zeros((count, max_new_tokens), jnp.float32).at[:, 0].set(logprob_PxG.reshape(-1)),
        ended_PxG=ended_1xR[0],
    )

    # Idle slots, which are then filled from the queue of unfinished rollouts.
    unfinished_R = (ended_1xR[0] == Ended.LENGTH) & (max_new_tokens > 1)
    slots = live_sizes(decoding.slots, count)[0]
    idle_M = jnp.full(slots, count, jnp.int32)
    zeros = jnp.zeros((config.layers, slots, config.kv_heads, 1, 1, config.head_size), policy.dtype)
    new = KeyValues(zeros, zeros)
    layout = cache_layout()
    own_keys = max(max_new_tokens - 1, 1)  # The last token of a response is never run.
    block = own_block_size(
        layout,
        own_keys,
        kv_heads=device_kv_heads(config.kv_heads),
        head_size=config.head_size,
        itemsize=zeros.dtype.itemsize,
    )
    state = DecodeState(
        step=jnp.int32(0),
        started=jnp.int32(0),
        rollout_M=idle_M,
        token_M=idle_M,
        count_M=idle_M,
        box_M=None if vocab is None else start_parsers(slots),
        own=empty_ring(new, slots, own_keys, block, layout.order),
        new=new,
        rollouts=rollouts,
    )
    inputs = DecodeInputs(
        params=prepare_decode_params(policy, params),
        vocab=vocab,
        shared=shared,
        unshared=False,
        prompt_lengths_R=jnp.repeat(prompts.lengths_P, samples),
        noise_RxT=noise_RxT,
        queue_R=jnp.argsort(~unfinished_R, stable=True),
        queue_size=unfinished_R.sum(),
        boxes_R=boxes_R,
    )
    return inputs, _refill(state, jnp.ones(slots, bool), inputs)


class Sampled(NamedTuple):
    """What the slots sampled in K decode steps.

    Attributes:
      token_KxM: int32 tokens.
      logprob_KxM: float32, their log-probabilities.
      routing: the experts of the tokens before them, [K, L, M, …]; None if the policy has none.
    """

    token_KxM: jax.Array
    logprob_KxM: jax.Array
    routing: Routing | None


def _decode_steps(
    policy: Transformer, decoding: Decoding, inputs: DecodeInputs, state: DecodeState
) -> tuple[DecodeState, Sampled]:
    """Run the last token of every live rollout and sample the next one, until the next check."""
    running_M = state.running_M
    rollout_M = state.rollout_M
    heads_per_kv = policy.config.heads // policy.config.kv_heads
    kernel = cache_kernel(policy.attention, jnp.dtype(policy.dtype).name)

    # What does not depend on the results of these steps. Idle slots read no blocks of the shared caches.
    shared = inputs.shared
    if inputs.unshared:
        shared = tuple(cache._replace(end_NxW=jnp.where(running_M[:, None], cache.end_NxW, 0)) for cache in shared)
    slot_rollout_M = None if inputs.unshared else jnp.where(running_M, rollout_M, _OUT_OF_RANGE)
    reads = tuple(shared_reads(cache, slot_rollout_M, heads_per_kv, kernel) for cache in shared)
    prompt_lengths_M = inputs.prompt_lengths_R.at[rollout_M].get(mode="clip")
    steps = steps_per_check(decoding)
    index_KxM = state.count_M + jnp.arange(steps)[:, None]
    uniform_KxM = inputs.noise_RxT.at[rollout_M[None], index_KxM].get(mode="clip")

    def step(state: DecodeState, uniform_M: jax.Array) -> tuple[DecodeState, Sampled]:
        # Write the previous step's keys, then run this step's tokens. Idle slots read none of their stale keys.
        cached_M = jnp.where(running_M, state.count_M - 1, 0)
        own = write_token(state.own, state.new, state.step - 1)
        attend = cached_attention(reads, own, state.step, cached_M, heads_per_kv, kernel)
        positions_M = prompt_lengths_M + cached_M
        hidden_MxD, new, routing = decode_token(policy, inputs.params, state.token_M, positions_M, attend)

        logits_MxV = _sampling_logits(decode_head(policy, inputs.params), hidden_MxD, decoding)
        token_M, logprob_M = sample_tokens(logits_MxV, uniform_M)
        state = state._replace(step=state.step + 1, token_M=token_M, count_M=state.count_M + 1, own=own, new=new)
        return state, Sampled(token_M, logprob_M, routing)

    if steps == 1:
        state, sampled = step(state, uniform_KxM[0])
        return state, jax.tree.map(lambda x: x[None], sampled)
    return jax.lax.scan(step, state, uniform_KxM)


def _store(
    state: DecodeState, sampled: Sampled, inputs: DecodeInputs, decoding: Decoding
) -> tuple[DecodeState, jax.Array]:
    """Append the sampled tokens to their responses, up to their ends; return also which slots are free afterwards."""
    steps = len(sampled.token_KxM)
    count_M = state.count_M - steps
    index_KxM = count_M + jnp.arange(steps)[:, None]

    # The first token that ends a response is its last one.
    ended_KxM, box_M = _check_end(sampled.token_KxM, state.box_M, inputs.vocab, decoding)
    ends_KxM = (ended_KxM != Ended.LENGTH) | (index_KxM + 1 >= decoding.max_new_tokens)
    ends_M = ends_KxM.any(axis=0)
    last_M = jnp.where(ends_M, jnp.argmax(ends_KxM, axis=0), steps - 1)
    ended_M = jnp.take_along_axis(ended_KxM, last_M[None], axis=0)[0]

    # Idle slots, and tokens after the end, have an index out of range, whose update is dropped.
    old = state.rollouts
    rollout_M = state.rollout_M
    entries_KxM = rollout_M[None], jnp.where(jnp.arange(steps)[:, None] <= last_M, index_KxM, _OUT_OF_RANGE)
    rollouts = Rollouts(
        tokens_PxGxT=old.tokens_PxGxT.at[entries_KxM].set(sampled.token_KxM, mode="drop"),
        lengths_PxG=old.lengths_PxG.at[rollout_M].set(count_M + last_M + 1, mode="drop"),
        logprobs_PxGxT=old.logprobs_PxGxT.at[entries_KxM].set(sampled.logprob_KxM, mode="drop"),
        ended_PxG=old.ended_PxG.at[rollout_M].set(ended_M, mode="drop"),
    )
    return state._replace(box_M=box_M, rollouts=rollouts), ends_M | ~state.running_M


def _refill(state: DecodeState, free_M: jax.Array, inputs: DecodeInputs) -> DecodeState:
    """Start the next rollouts of the queue in the free slots. Without any left, the slots become idle."""
    count = inputs.queue_R.size
    place_M = state.started + jnp.cumsum(free_M) - 1  # Place in the queue that a free slot takes.
    fresh_M = jnp.where(place_M < inputs.queue_size, inputs.queue_R.at[place_M].get(mode="clip"), count)
    rollout_M = jnp.where(free_M, fresh_M, state.rollout_M).astype(jnp.int32)

    def reset_free(initial_R: jax.Array, x_M: jax.Array) -> jax.Array:
        return jnp.where(free_M, initial_R.at[rollout_M].get(mode="clip"), x_M)

    return state._replace(
        started=jnp.minimum(state.started + free_M.sum(), inputs.queue_size).astype(jnp.int32),
        rollout_M=rollout_M,
        token_M=reset_free(state.rollouts.tokens_PxGxT[:, 0], state.token_M),
        count_M=jnp.where(free_M, 1, state.count_M),
        box_M=jax.tree.map(reset_free, inputs.boxes_R, state.box_M),
    )


def _sampling_logits(head: Head, hidden_MxD: jax.Array, decoding: Decoding) -> jax.Array:
    """Return the logits of the distribution that tokens are sampled from, float32 [M, V]."""
    logits_MxV = scaled_logits(head, hidden_MxD, decoding.temperature)
    return truncate(logits_MxV, decoding.top_k, decoding.top_p)


def _check_end(
    token_KxM: jax.Array, box_M: BoxParser | None, vocab: ByteVocab | None, decoding: Decoding
) -> tuple[jax.Array, BoxParser | None]:
    """Return why each response ends with each of its new tokens, LENGTH if it does not, and the new parser states."""
    is_stop_KxM = jnp.isin(token_KxM, jnp.array(decoding.stop_ids, jnp.int32))
    ended_KxM = jnp.where(is_stop_KxM, Ended.STOP, Ended.LENGTH).astype(jnp.int32)
    if box_M is None or vocab is None:
        return ended_KxM, None
    box_M, closed_KxM = read_box(
        box_M,
        token_KxM,
        jnp.asarray(vocab.bytes_VxX),
        jnp.asarray(vocab.lengths_V),
        decoding.end_think_id,
        bytes_per_check=1 if len(token_KxM) == 1 else _BYTES_PER_TOKEN * len(token_KxM),
    )
    return jnp.where(closed_KxM & ~is_stop_KxM, Ended.BOX, ended_KxM).astype(jnp.int32), box_M
