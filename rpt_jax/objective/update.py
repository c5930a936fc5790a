"""One policy update from one batch of rollouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.objective.loss import clipped_policy_loss
from rpt_jax.policy.transformer import Params, Transformer, branch_hidden, head

Output = TypeVar("Output")
# Below these sizes another compiled program costs more than the padding.
_SMALLEST_PROMPT, _SMALLEST_RESPONSE = 128, 16


class TrainState(NamedTuple):
    """What an optimiser step changes."""

    params: Params
    optimizer: optax.OptState


class UpdateBatch(NamedTuple):
    """P groups of G responses.

    Attributes:
      prompts_PxS, lengths_P: int32 prompts, padded on the right.
      tokens_PxGxT: int32 responses.
      mask_PxGxT: bool, True for response tokens up to and including the stop token.
      sampler_logprobs_PxGxT: float32, what the sampler believed; for the mismatch metric only.
      advantages_PxG: float32.
      counted_P: bool, groups that belong to the batch; all but those that dynamic sampling could not replace.
    """

    prompts_PxS: jax.Array
    lengths_P: jax.Array
    tokens_PxGxT: jax.Array
    mask_PxGxT: jax.Array
    sampler_logprobs_PxGxT: jax.Array
    advantages_PxG: jax.Array
    counted_P: jax.Array

    @property
    def longest_P(self) -> jax.Array:
        """Tokens of the longest response of each group."""
        return self.mask_PxGxT.sum(axis=-1).max(axis=-1)

    def cut(self, prompt: int, response: int) -> UpdateBatch:
        """Return the batch with room for so many tokens only."""
        return self._replace(
            prompts_PxS=self.prompts_PxS[:, :prompt],
            tokens_PxGxT=self.tokens_PxGxT[..., :response],
            mask_PxGxT=self.mask_PxGxT[..., :response],
            sampler_logprobs_PxGxT=self.sampler_logprobs_PxGxT[..., :response],
        )


class UpdateConfig(NamedTuple):
    """`microbatch` (prompts) and `chunk` (tokens of logits) bound memory and do not change the result."""

    minibatches: int
    microbatch: int
    chunk: int
    temperature: float
    clip_low: float
    clip_high: float


def response_logprobs(
    policy: Transformer, params: Params, batch: UpdateBatch, temperature: float, chunk: int
) -> jax.Array:
    """Log-probability of every response token at the sampling temperature, float32 [P, G, T]; defined under the mask."""
    hidden_PxGxTxD = branch_hidden(policy, params, batch.prompts_PxS, batch.lengths_P, batch.tokens_PxGxT)
    flat_MxD = hidden_PxGxTxD.reshape(-1, hidden_PxGxTxD.shape[-1])
    logprobs_M = token_logprobs(head(policy, params), flat_MxD, batch.tokens_PxGxT.reshape(-1), temperature, chunk)
    return logprobs_M.reshape(batch.tokens_PxGxT.shape)


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "config"), donate_argnames=("state",))
def update_policy(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    config: UpdateConfig,
    state: TrainState,
    batch: UpdateBatch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take `config.minibatches` optimiser steps on `batch`, each on its own part of the groups.

    With one minibatch the update is exactly on-policy: the old log-probabilities are the new ones, without another forward
    pass. With several, they are computed once before the first step.
    """
    minibatches = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), batch)
    old = None
    if config.minibatches > 1:
        old = jax.lax.map(
            lambda part: response_logprobs(policy, state.params, part, config.temperature, config.chunk), minibatches
        )

    def step(state: TrainState, inputs: tuple[UpdateBatch, jax.Array | None]) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = policy_gradient(policy, state.params, *inputs, config)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics["gradient/norm"] = optax.tree.norm(grads)
        return TrainState(optax.apply_updates(state.params, updates), optimizer_state), metrics

    if config.minibatches == 1:
        return step(state, (batch, None))
    state, metrics = jax.lax.scan(step, state, (minibatches, old))
    return state, jax.tree.map(jnp.mean, metrics)


def policy_gradient(
    policy: Transformer,
    params: Params,
    batch: UpdateBatch,
    old_logprobs_PxGxT: jax.Array | None,
    config: UpdateConfig,
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the token mean of the clipped loss over the counted groups, and what to report of it.

    Microbatches add up numerators; the one global denominator, the number of counted response tokens, divides once. Groups
    whose advantages are all zero contribute exactly nothing to the numerator: they are sorted to the end and the microbatches
    that hold only them are not run. The metrics are of the others alone: they must not depend on who shares a microbatch.
    The others are sorted by size, so that microbatches of short ones need little room.
    """
    informative_P = (batch.advantages_PxG != 0).any(axis=1) & batch.counted_P
    order_P = jnp.lexsort((batch.lengths_P, batch.longest_P > _room(batch)[1][0], ~informative_P))
    groups = order_P.shape[0]
    microbatch = min(config.microbatch, groups)
    if groups % microbatch:
        raise ValueError(f"a microbatch of {microbatch} groups does not divide {groups} groups.")
    # Exactly on-policy the ratio is 1 whatever these are; None would change the tree that the loop carries.
    old = jnp.zeros_like(batch.sampler_logprobs_PxGxT) if old_logprobs_PxGxT is None else old_logprobs_PxGxT

    def numerator(params: Params, part: UpdateBatch, old_part: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logprobs = response_logprobs(policy, params, part, config.temperature, config.chunk)
        reference = jax.lax.stop_gradient(logprobs) if old_logprobs_PxGxT is None else old_part
        mask = part.mask_PxGxT & part.counted_P[:, None, None]
        advantages = part.advantages_PxG[..., None]
        loss = clipped_policy_loss(logprobs, reference, advantages, mask, config.clip_low, config.clip_high)
        mismatch = jnp.abs(jnp.where(mask, jax.lax.stop_gradient(logprobs) - part.sampler_logprobs_PxGxT, 0.0))
        sums = {"loss": loss.loss, "ratio": loss.ratio, "clipped": loss.clipped}
        return loss.loss, sums | {"mismatch": mismatch.sum(), "worst": mismatch.max(), "tokens": mask.sum()}

    def accumulate(index: jax.Array, carry: tuple[Params, dict[str, jax.Array]]) -> tuple[Params, dict[str, jax.Array]]:
        rows = jax.lax.dynamic_slice_in_dim(order_P, index * microbatch, microbatch)
        part, old_part = jax.tree.map(lambda x: x[rows], (batch._replace(counted_P=informative_P), old))
        grads, sums = _in_fewest_tokens(
            lambda part: jax.grad(numerator, has_aux=True)(params, part, old_part[..., : part.mask_PxGxT.shape[-1]]),
            part,
        )
        totals = jax.tree.map(jnp.add, carry[1], sums)
        totals["worst"] = jnp.maximum(carry[1]["worst"], sums["worst"])
        return jax.tree.map(jnp.add, carry[0], grads), totals

    zeros = dict.fromkeys(("loss", "ratio", "clipped", "mismatch", "worst"), jnp.float32(0)) | {"tokens": jnp.int32(0)}
    used = -(-informative_P.sum() // microbatch)
    grads, sums = jax.lax.fori_loop(0, used, accumulate, (jax.tree.map(jnp.zeros_like, params), zeros))
    tokens = jnp.maximum((batch.mask_PxGxT & batch.counted_P[:, None, None]).sum(), 1)
    seen = jnp.maximum(sums["tokens"], 1)
    metrics = {
        "loss/policy": sums["loss"] / tokens,
        "ratio/mean": jnp.where(sums["tokens"] > 0, sums["ratio"] / seen, 1.0),
        "ratio/clipped": sums["clipped"] / seen,
        "mismatch/mean": sums["mismatch"] / seen,
        "mismatch/max": sums["worst"],
        "update/tokens": sums["tokens"].astype(jnp.float32),
    }
    return jax.tree.map(lambda g: g / tokens, grads), metrics


def _in_fewest_tokens(fn: Callable[[UpdateBatch], Output], batch: UpdateBatch) -> Output:
    """Apply `fn`, compiled for a few sizes, to `batch` without most of its padding.

    Responses are much shorter than their limit, most of the time, and the trunk's work is in proportion to the room they get.
    """
    prompts, responses = _room(batch)
    long_prompt = (batch.lengths_P * batch.counted_P).max() > prompts[0]
    long_response = (batch.longest_P * batch.counted_P).max() > responses[0]
    sizes = [functools.partial(UpdateBatch.cut, prompt=s, response=t) for s in prompts for t in responses]
    branches = [lambda batch, cut=cut: fn(cut(batch)) for cut in sizes]
    return jax.lax.switch(long_prompt * len(responses) + long_response, branches, batch)


def _room(batch: UpdateBatch) -> tuple[list[int], list[int]]:
    """The sizes of prompts and of responses that programs are compiled for, smallest first."""
    prompt, response = batch.prompts_PxS.shape[1], batch.mask_PxGxT.shape[2]
    prompts = [prompt // 2, prompt] if prompt // 2 >= _SMALLEST_PROMPT else [prompt]
    responses = [response // 4, response] if response // 4 >= _SMALLEST_RESPONSE else [response]
    return prompts, responses
