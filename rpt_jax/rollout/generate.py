"""Rollouts: prefill once per prompt, then decode all samples in one loop on the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.objective.logprobs import chosen_logprobs, scaled_logits
from rpt_jax.policy.attention import Context, KeyValues
from rpt_jax.policy.transformer import Head, Params, Transformer, head, prefill
from rpt_jax.rollout.sampling import rollout_keys, sample_tokens, uniform_at


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


class _Live(NamedTuple):
    """The part of the batch that is still being decoded, and how far it is."""

    step: jax.Array
    prompt: Context
    lengths_P: jax.Array
    keys_PxG: jax.Array
    rollouts: Rollouts
    hidden_PxGxD: jax.Array
    past: KeyValues

    def take(self, rows: jax.Array) -> _Live:
        """Return the prompts `rows` of it."""
        by_layer = jax.tree.map(lambda x: x[:, rows], (self.prompt.kv, self.past))
        lengths, keys, rollouts, hidden = jax.tree.map(
            lambda x: x[rows], (self.lengths_P, self.keys_PxG, self.rollouts, self.hidden_PxGxD)
        )
        prompt = Context(by_layer[0], end_NxGxQ=self.prompt.end_NxGxQ[rows])
        return _Live(self.step, prompt, lengths, keys, rollouts, hidden, by_layer[1])


@functools.partial(jax.jit, static_argnames=("policy", "samples", "max_new_tokens", "temperature", "stop_ids"))
def generate(
    policy: Transformer,
    params: Params,
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    prompt_ids_P: jax.Array,
    key: jax.Array,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: tuple[int, ...],
) -> Rollouts:
    """Sample `samples` responses to each prompt.

    The noise of a token is a function of (key, prompt id, sample, position in the response): the same rollouts come out for
    any order of the prompts and any batch they are part of.

    Args:
      policy, params: the decoder and its parameters.
      prompts_PxS: int32 ids, padded on the right with anything.
      lengths_P: int32 prompt lengths, at least 1.
      prompt_ids_P: int32, tells prompts apart for the noise.
      key: fold_in(run's key, step).
      samples: G.
      max_new_tokens: T, the length limit.
      temperature: above 0.
      stop_ids: tokens that end a response; none, and every response is T long.
    """
    _, prompt, hidden_PxD = prefill(policy, params, prompts_PxS, lengths_P)
    size = prompts_PxS.shape[0]
    live = _Live(
        step=jnp.int32(0),
        prompt=prompt,
        lengths_P=lengths_P,
        keys_PxG=rollout_keys(key, prompt_ids_P, samples),
        rollouts=_empty(size, samples, max_new_tokens),
        hidden_PxGxD=jnp.broadcast_to(hidden_PxD[:, None], (size, samples, hidden_PxD.shape[1])),
        past=jax.tree.map(
            lambda kv: jnp.zeros((*kv.shape[:3], samples, max_new_tokens, kv.shape[-1]), kv.dtype), prompt.kv
        ),
    )
    decode = functools.partial(_decode, policy, params, temperature, stop_ids)
    rollouts, rows_P = live.rollouts, jnp.arange(size)
    # Most responses are short and few are long: what is left is decoded in a batch of half the size, twice at most.
    sizes = [size >> i for i in range(3) if size % (1 << i) == 0]
    for size, enough in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < rows_P.shape[0]:
            unfinished_first = jnp.argsort(live.rollouts.stopped_PxG.all(axis=1), stable=True)[:size]
            live, rows_P = live.take(unfinished_first), rows_P[unfinished_first]
        live = jax.lax.while_loop(functools.partial(_more_than, enough), decode, live)
        rollouts = jax.tree.map(lambda x, y, rows=rows_P: x.at[rows].set(y), rollouts, live.rollouts)
    return rollouts


def _more_than(prompts: int, live: _Live) -> jax.Array:
    unfinished = ~live.rollouts.stopped_PxG.all(axis=1)
    return (live.step < live.rollouts.tokens_PxGxT.shape[-1]) & (unfinished.sum() > prompts)


def _decode(policy: Transformer, params: Params, temperature: float, stop_ids: tuple[int, ...], live: _Live) -> _Live:
    """Sample one token of every rollout, and run it through the trunk."""
    rollouts = _append_token(live, head(policy, params), temperature, stop_ids)
    tokens_PxGx1 = jax.lax.dynamic_slice_in_dim(rollouts.tokens_PxGxT, live.step, 1, axis=2)
    positions = jnp.broadcast_to((live.lengths_P + live.step)[:, None, None], tokens_PxGx1.shape)
    contexts = (live.prompt, Context(live.past, end_NxGxQ=live.step[None, None, None]))
    hidden, new = policy.apply({"params": params}, tokens_PxGx1, positions, contexts)
    past = jax.tree.map(
        lambda cache, x: jax.lax.dynamic_update_slice_in_dim(cache, x, live.step, axis=4), live.past, new
    )
    return live._replace(step=live.step + 1, rollouts=rollouts, hidden_PxGxD=hidden[:, :, 0], past=past)


def _empty(prompts: int, samples: int, max_new_tokens: int) -> Rollouts:
    return Rollouts(
        tokens_PxGxT=jnp.zeros((prompts, samples, max_new_tokens), jnp.int32),
        lengths_PxG=jnp.zeros((prompts, samples), jnp.int32),
        logprobs_PxGxT=jnp.zeros((prompts, samples, max_new_tokens), jnp.float32),
        stopped_PxG=jnp.zeros((prompts, samples), bool),
    )


def _append_token(live: _Live, head: Head, temperature: float, stop_ids: tuple[int, ...]) -> Rollouts:
    """Sample the next token of every rollout that still runs and write it down."""
    rollouts, shape = live.rollouts, live.keys_PxG.shape
    logits_BxV = scaled_logits(head, live.hidden_PxGxD.reshape(-1, live.hidden_PxGxD.shape[-1]), temperature)
    tokens_B = sample_tokens(logits_BxV, uniform_at(live.keys_PxG, live.step).reshape(-1))
    logprobs_PxG = chosen_logprobs(logits_BxV, tokens_B).reshape(shape)
    running = ~rollouts.stopped_PxG
    tokens_PxG = jnp.where(running, tokens_B.reshape(shape), 0)
    is_stop = jnp.isin(tokens_PxG, jnp.array(stop_ids, jnp.int32)) & running
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=live.step, axis=2)
    return Rollouts(
        tokens_PxGxT=put(rollouts.tokens_PxGxT, tokens_PxG),
        lengths_PxG=rollouts.lengths_PxG + running,
        logprobs_PxGxT=put(rollouts.logprobs_PxGxT, jnp.where(running, logprobs_PxG, 0.0)),
        stopped_PxG=rollouts.stopped_PxG | is_stop,
    )
