"""One policy update from one batch of rollouts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.objective.batch import UpdateBatch, UpdateConfig
from rpt_jax.objective.gradient import document_gradient, policy_gradient, response_logprobs


class TrainState(NamedTuple):
    """What an optimizer step changes."""

    params: Params
    optimizer: optax.OptState
    average: Params | None = None  # Moving average of the parameters, where the reward is measured against it.


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "config"), donate_argnames=("state",))
def update_policy(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    config: UpdateConfig,
    state: TrainState,
    batch: UpdateBatch,
    reference: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take `config.minibatches` optimizer steps on `batch`, each on its own part of the groups.

    With one minibatch the update is exactly on-policy: the old log-probabilities are the new ones, without another forward
    pass. With several, they are computed once before the first step. `reference` are the parameters that the KL term holds
    the policy to. An update that meets a number which is not finite changes nothing, and its metrics are not finite either.
    """
    begin = state
    minibatches = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), batch)
    old = None
    if config.minibatches > 1:
        old = jax.lax.map(lambda part: response_logprobs(policy, state.params, part, config), minibatches)

    def step(state: TrainState, inputs: tuple[UpdateBatch, jax.Array | None]) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = policy_gradient(policy, state.params, *inputs, config, reference)
        if config.document_weight:
            more, loss = document_gradient(policy, state.params, inputs[0].documents, config)
            grads = jax.tree.map(lambda g, d: g + config.document_weight * d, grads, more)
            metrics["loss/document"] = loss
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics["gradient/norm"], metrics["update/norm"] = optax.tree.norm(grads), optax.tree.norm(updates)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=optimizer_state), metrics

    if config.minibatches == 1:
        state, metrics = step(state, (batch, None))
    else:
        state, metrics = jax.lax.scan(step, state, (minibatches, old))
        counted = {name: metrics[name].sum() for name in ("update/tokens", "update/trunk_tokens")}
        metrics = jax.tree.map(jnp.mean, metrics) | counted
    if state.average is not None:
        state = state._replace(average=moving_average(state.average, state.params, config.average_decay))
    return if_finite(metrics, state, begin), metrics


def if_finite(metrics: dict[str, jax.Array], new: TrainState, old: TrainState) -> TrainState:
    """`new` where every metric is finite, else `old`. The norms among them are not where any number of `new` is not."""
    finite = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def moving_average(average: Params, params: Params, decay: float) -> Params:
    """τ φ + (1 - τ) θ, once a step (RLP, 2510.01265)."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)
