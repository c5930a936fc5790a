"""One policy update from one batch of rollouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpt_jax.objective.logprobs import token_logprobs, token_logprobs_and_entropies
from rpt_jax.objective.loss import AGGREGATIONS, IMPORTANCES, KLS, LOSSES, Bounds
from rpt_jax.policy.transformer import Params, Transformer, branch_hidden, head, prefill

Output = TypeVar("Output")
# Below these sizes another compiled program costs more than the padding.
_SMALLEST_PROMPT, _SMALLEST_RESPONSE = 128, 16
# Distances of log-probabilities are counted in bins, each an eighth wider than the one before: counts add up, quantiles do not.
_DISTANCES = np.logspace(-9, 1, 197, dtype=np.float32)


class TrainState(NamedTuple):
    """What an optimiser step changes."""

    params: Params
    optimizer: optax.OptState
    average: Params | None = None  # Moving average of the parameters, where the reward is measured against it.


class Documents(NamedTuple):
    """Text for next-token cross-entropy: `targets` follow `inputs`, both int32 [N, S]; `mask_NxS` is bool."""

    inputs_NxS: jax.Array
    targets_NxS: jax.Array
    mask_NxS: jax.Array


class UpdateBatch(NamedTuple):
    """P groups of G responses.

    Attributes:
      prompts_PxS, lengths_P: int32 prompts, padded on the right.
      tokens_PxGxT: int32 responses.
      mask_PxGxT: bool, True for response tokens up to and including the stop token.
      sampler_logprobs_PxGxT: float32, what the sampler believed; for the mismatch alone.
      advantages_PxG: float32.
      counted_P: bool, groups that belong to the batch; all but those that dynamic sampling could not replace.
      documents: those that the P prompts are from, where their cross-entropy is learnt beside the responses.
    """

    prompts_PxS: jax.Array
    lengths_P: jax.Array
    tokens_PxGxT: jax.Array
    mask_PxGxT: jax.Array
    sampler_logprobs_PxGxT: jax.Array
    advantages_PxG: jax.Array
    counted_P: jax.Array
    documents: Documents | None = None

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
    """`microbatch` (prompts) and `chunk` (tokens of logits) bound memory and do not change the result.

    The others are the objective: names in objective/loss.py, and numbers that belong to them (see `config.ObjectiveConfig`).
    """

    minibatches: int
    microbatch: int
    chunk: int
    temperature: float
    bounds: Bounds
    loss: str = "clip"
    aggregation: str = "token_mean"
    response_limit: int = 1
    importance: str = "none"
    importance_low: float = 0.5
    importance_high: float = 2.0
    kl: str = "none"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    document_weight: float = 0.0
    average_decay: float = 0.0

    @property
    def every_group_matters(self) -> bool:
        """Whether groups without variance have a gradient, or must be looked at to know which of their tokens count."""
        return self.kl != "none" or self.entropy_weight > 0 or self.importance == "mask"

    @property
    def sums(self) -> tuple[str, ...]:
        """What is added up over microbatches to be reported."""
        optional = {"kl": self.kl != "none", "entropy": self.entropy_weight > 0, "weight": self.importance != "none"}
        return ("loss", "ratio", "clipped", "mismatch", "worst", *(name for name, on in optional.items() if on))


def response_hidden(policy: Transformer, params: Params, batch: UpdateBatch) -> tuple[jax.Array, jax.Array]:
    """Flat states and the tokens that they predict: hidden_MxD, tokens_M."""
    hidden_PxGxTxD = branch_hidden(policy, params, batch.prompts_PxS, batch.lengths_P, batch.tokens_PxGxT)
    return hidden_PxGxTxD.reshape(-1, hidden_PxGxTxD.shape[-1]), batch.tokens_PxGxT.reshape(-1)


def response_logprobs(
    policy: Transformer, params: Params, batch: UpdateBatch, temperature: float, chunk: int
) -> jax.Array:
    """Log-probability of every response token at the sampling temperature, float32 [P, G, T]; defined under the mask."""
    logprobs_M = token_logprobs(head(policy, params), *response_hidden(policy, params, batch), temperature, chunk)
    return logprobs_M.reshape(batch.tokens_PxGxT.shape)


def response_logprobs_and_entropies(
    policy: Transformer, params: Params, batch: UpdateBatch, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`response_logprobs`, and the entropy of the distribution that each token was drawn from."""
    scores = token_logprobs_and_entropies(
        head(policy, params), *response_hidden(policy, params, batch), temperature, chunk
    )
    return jax.tree.map(lambda x: x.reshape(batch.tokens_PxGxT.shape), scores)


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "config"), donate_argnames=("state",))
def update_policy(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    config: UpdateConfig,
    state: TrainState,
    batch: UpdateBatch,
    reference: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take `config.minibatches` optimiser steps on `batch`, each on its own part of the groups.

    With one minibatch the update is exactly on-policy: the old log-probabilities are the new ones, without another forward
    pass. With several, they are computed once before the first step. `reference` are the parameters that the KL term holds
    the policy to.
    """
    minibatches = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), batch)
    old = None
    if config.minibatches > 1:
        old = jax.lax.map(
            lambda part: response_logprobs(policy, state.params, part, config.temperature, config.chunk), minibatches
        )

    def step(state: TrainState, inputs: tuple[UpdateBatch, jax.Array | None]) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = policy_gradient(policy, state.params, *inputs, config, reference)
        if config.document_weight:
            more, loss = document_gradient(policy, state.params, inputs[0].documents, config)
            grads = jax.tree.map(lambda g, d: g + config.document_weight * d, grads, more)
            metrics["loss/document"] = loss
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics["gradient/norm"] = optax.tree.norm(grads)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=optimizer_state), metrics

    if config.minibatches == 1:
        state, metrics = step(state, (batch, None))
    else:
        state, metrics = jax.lax.scan(step, state, (minibatches, old))
        metrics = jax.tree.map(jnp.mean, metrics)
    if state.average is not None:
        state = state._replace(average=moving_average(state.average, state.params, config.average_decay))
    return state, metrics


def moving_average(average: Params, params: Params, decay: float) -> Params:
    """τ φ + (1 - τ) θ, once a step (RLP, 2510.01265)."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)


def policy_gradient(
    policy: Transformer,
    params: Params,
    batch: UpdateBatch,
    old_logprobs_PxGxT: jax.Array | None,
    config: UpdateConfig,
    reference: Params | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the loss over the counted groups, and what to report of it.

    Microbatches add up numerators and denominators; the one global denominator divides once. Groups whose advantages are all
    zero contribute exactly nothing to the numerator, unless a term without advantages is on: they are sorted to the end and
    the microbatches that hold only them are not run. The metrics are of the others alone: they must not depend on who shares a
    microbatch. The others are sorted by size, so that microbatches of short ones need little room.
    """
    taught_P = (
        batch.counted_P if config.every_group_matters else (batch.advantages_PxG != 0).any(axis=1) & batch.counted_P
    )
    order_P = jnp.lexsort((batch.lengths_P, batch.longest_P > _room(batch)[1][0], ~taught_P))
    groups = order_P.shape[0]
    microbatch = min(config.microbatch, groups)
    if groups % microbatch:
        raise ValueError(f"a microbatch of {microbatch} groups does not divide {groups} groups.")
    # Exactly on-policy the ratio is 1 whatever these are; None would change the tree that the loop carries.
    old = jnp.zeros_like(batch.sampler_logprobs_PxGxT) if old_logprobs_PxGxT is None else old_logprobs_PxGxT
    taught = batch._replace(counted_P=taught_P, documents=None)

    def numerator(params: Params, part: UpdateBatch, old_part: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        old_part = None if old_logprobs_PxGxT is None else old_part[..., : part.mask_PxGxT.shape[-1]]
        sums = loss_sums(policy, params, part, old_part, config, reference)
        return sums["loss"], sums

    def accumulate(index: jax.Array, carry: tuple[Params, dict[str, jax.Array]]) -> tuple[Params, dict[str, jax.Array]]:
        rows = jax.lax.dynamic_slice_in_dim(order_P, index * microbatch, microbatch)
        part, old_part = jax.tree.map(lambda x: x[rows], (taught, old))
        grads, sums = _in_fewest_tokens(lambda part: jax.grad(numerator, has_aux=True)(params, part, old_part), part)
        totals = jax.tree.map(jnp.add, carry[1], sums)
        totals["worst"] = jnp.maximum(carry[1]["worst"], sums["worst"])
        return jax.tree.map(jnp.add, carry[0], grads), totals

    zeros = dict.fromkeys(config.sums, jnp.float32(0)) | dict.fromkeys(("tokens", "kept", "count"), jnp.int32(0))
    zeros["distances"] = jnp.zeros(len(_DISTANCES) + 1, jnp.int32)
    used = -(-taught_P.sum() // microbatch)
    grads, sums = jax.lax.fori_loop(0, used, accumulate, (jax.tree.map(jnp.zeros_like, params), zeros))
    idle = batch.mask_PxGxT & (batch.counted_P & ~taught_P)[:, None, None]
    count = jnp.maximum(sums["count"] + AGGREGATIONS[config.aggregation](idle, config.response_limit)[1], 1)
    return jax.tree.map(lambda g: g / count, grads), _loss_metrics(sums, count)


def loss_sums(
    policy: Transformer,
    params: Params,
    batch: UpdateBatch,
    old_logprobs_PxGxT: jax.Array | None,
    config: UpdateConfig,
    reference: Params | None,
) -> dict[str, jax.Array]:
    """What one microbatch adds: to the numerator of the loss, "loss", to its denominator, "count", and to the metrics.

    Each token's term is weight · policy loss + kl_weight · KL - entropy_weight · entropy.
    """
    scored = (policy, params, batch, config.temperature, config.chunk)
    logprobs, entropies = (
        response_logprobs_and_entropies(*scored) if config.entropy_weight else (response_logprobs(*scored), None)
    )
    now = jax.lax.stop_gradient(logprobs)
    old = now if old_logprobs_PxGxT is None else old_logprobs_PxGxT
    mask = batch.mask_PxGxT & batch.counted_P[:, None, None]
    token = LOSSES[config.loss](logprobs, old, batch.advantages_PxG[..., None], mask, config.bounds)
    terms, kept, sums = token.loss, mask, {}
    if config.importance != "none":
        ratio = jnp.exp(jnp.where(mask, old - batch.sampler_logprobs_PxGxT, 0.0))
        weights, accepted = IMPORTANCES[config.importance](ratio, config.importance_low, config.importance_high)
        terms, kept = weights * terms, mask & accepted
        sums["weight"] = jnp.sum(jnp.where(kept, weights, 0.0))
    if config.kl != "none":
        theirs = response_logprobs(policy, reference, *scored[2:])
        kl = KLS[config.kl](*(jnp.where(mask, x, 0.0) for x in (logprobs, theirs)))
        terms, sums["kl"] = terms + config.kl_weight * kl, jnp.sum(jnp.where(kept, kl, 0.0))
    if entropies is not None:
        terms, sums["entropy"] = terms - config.entropy_weight * entropies, jnp.sum(jnp.where(kept, entropies, 0.0))
    shares, count = AGGREGATIONS[config.aggregation](kept, config.response_limit)
    mismatch = jnp.abs(jnp.where(mask, now - batch.sampler_logprobs_PxGxT, 0.0))
    return sums | {
        "loss": jnp.sum(jnp.where(kept, shares * terms, 0.0)),
        "count": count,
        "ratio": jnp.sum(jnp.where(mask, token.ratio, 0.0)),
        "clipped": jnp.sum(mask & token.clipped).astype(jnp.float32),
        "mismatch": mismatch.sum(),
        "worst": mismatch.max(),
        "distances": jnp.zeros(len(_DISTANCES) + 1, jnp.int32).at[jnp.searchsorted(_DISTANCES, mismatch)].add(mask),
        "kept": kept.sum(),
        "tokens": mask.sum(),
    }


def _loss_metrics(sums: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    seen, kept = (jnp.maximum(sums[name], 1) for name in ("tokens", "kept"))
    below_99 = jnp.cumsum(sums["distances"]) < 0.99 * sums["tokens"]
    metrics = {
        "loss/policy": sums["loss"] / count,
        "ratio/mean": jnp.where(sums["tokens"] > 0, sums["ratio"] / seen, 1.0),
        "ratio/clipped": sums["clipped"] / seen,
        "mismatch/mean": sums["mismatch"] / seen,
        # The end of the bin in which the 99th percentile lies.
        "mismatch/p99": jnp.minimum(
            jnp.asarray(_DISTANCES)[below_99.sum().clip(max=len(_DISTANCES) - 1)], sums["worst"]
        ),
        "mismatch/max": sums["worst"],
        "update/tokens": sums["tokens"].astype(jnp.float32),
    }
    if "weight" in sums:
        rejected = (sums["tokens"] - sums["kept"]) / seen
        metrics |= {"importance/mean": sums["weight"] / kept, "importance/rejected": rejected}
    names = {"kl": "policy/kl", "entropy": "policy/entropy_exact"}
    return metrics | {names[name]: sums[name] / kept for name in names if name in sums}


def document_gradient(
    policy: Transformer, params: Params, documents: Documents, config: UpdateConfig
) -> tuple[Params, jax.Array]:
    """Gradient of the mean next-token cross-entropy over the documents' tokens (paper, Equation 1), and that mean."""
    size = documents.inputs_NxS.shape[1]
    microbatch = min(config.microbatch, documents.inputs_NxS.shape[0])

    def nll(params: Params, part: Documents) -> jax.Array:
        lengths_N = jnp.full(microbatch, size, jnp.int32)
        hidden_NxSxD, _, _ = prefill(policy, params, part.inputs_NxS, lengths_N)
        flat_MxD = hidden_NxSxD.reshape(-1, hidden_NxSxD.shape[-1])
        logprobs_M = token_logprobs(head(policy, params), flat_MxD, part.targets_NxS.reshape(-1), 1.0, config.chunk)
        return -jnp.sum(jnp.where(part.mask_NxS.reshape(-1), logprobs_M, 0.0))

    def accumulate(index: jax.Array, carry: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        rows = index * microbatch + jnp.arange(microbatch)
        part = jax.tree.map(lambda x: x[rows], documents)
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(nll)(params, part))

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    loss, grads = jax.lax.fori_loop(0, documents.inputs_NxS.shape[0] // microbatch, accumulate, zeros)
    tokens = jnp.maximum(documents.mask_NxS.sum(), 1)
    return jax.tree.map(lambda g: g / tokens, grads), loss / tokens


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
