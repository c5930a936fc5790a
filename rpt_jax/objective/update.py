"""One policy update from one batch of rollouts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rpt_jax.config import ObjectiveConfig
from rpt_jax.model.lora import join_adapters
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.gradient import document_gradient, policy_gradient, response_logprobs
from rpt_jax.objective.minibatches import split_minibatches

# Metrics that add up over the optimizer steps of a batch.
SUMMED_METRICS = ("update/tokens", "update/trunk_tokens", "update/skipped", "update/flops")


class TrainState(NamedTuple):
    """What an optimizer step changes.

    Attributes:
      params: float32 parameters that are trained: all of the policy, or its adapters (model/lora.py).
      optimizer: state of the optimizer.
      average: moving average of `params`, the baseline of the reward "info_gain"; None for other rewards.
    """

    params: Params
    optimizer: optax.OptState
    average: Params | None = None

    def with_frozen(self, frozen: Params | None) -> TrainState:
        """Return the state with all parameters of the policy, and of the average, in place of those that are trained."""
        average = None if self.average is None else join_adapters(frozen, self.average)
        return self._replace(params=join_adapters(frozen, self.params), average=average)


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "objective", "limits"), donate_argnames=("state",))
@jax.named_scope("update")
@in_policy_precision
def update_policy(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    limits: UpdateLimits,
    state: TrainState,
    batch: UpdateBatch,
    reference: Params | None = None,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take `limits.minibatches` optimizer steps on `batch`, each on its own part of the groups.

    With one minibatch the update is exactly on-policy: the old log-probabilities equal the new ones and take no extra
    forward pass. With several, they are computed once before the first step. A minibatch in which no token has a
    gradient is skipped: momentum and weight decay do not move the policy either. If any metric is not finite, the state
    is returned unchanged.

    Args:
      policy, optimizer, objective, limits: static.
      state: donated.
      batch: the groups to learn from.
      reference: parameters of the KL term's reference policy; None without a KL term.
      frozen: parameters of the policy that are not trained; None if all are.

    Returns: the new state, and metrics by their names in metrics.jsonl.
    """
    initial = state

    def step(state: TrainState, inputs: tuple[UpdateBatch, jax.Array | None]) -> tuple[TrainState, dict[str, Any]]:
        part, old_logprobs_PxGxT = inputs
        grads, metrics = policy_gradient(
            policy, objective, limits, state.params, part, old_logprobs_PxGxT, reference, frozen
        )
        if objective.document_weight:
            assert part.documents is not None
            document_grads, loss, flops = document_gradient(policy, limits, state.params, part.documents, frozen)
            grads = jax.tree.map(lambda g, d: g + objective.document_weight * d, grads, document_grads)
            metrics |= {"loss/document": loss, "update/skipped": jnp.float32(0)}
            metrics["update/flops"] += flops
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        learns = metrics["update/skipped"] == 0
        metrics["gradient/norm"] = optax.tree.norm(grads)
        metrics["update/norm"] = jnp.where(learns, optax.tree.norm(updates), 0.0)
        return keep_if(learns, state._replace(params=params, optimizer=optimizer_state), state), metrics

    # One optimizer step per minibatch. With several, all old log-probabilities are those before the first step.
    if limits.minibatches == 1:
        state, metrics = step(state, (batch, None))
    else:
        minibatches = split_minibatches(batch, limits.minibatches)
        params = join_adapters(frozen, state.params)
        old, old_flops = jax.lax.map(lambda part: response_logprobs(policy, limits, params, part), minibatches)
        state, per_step = jax.lax.scan(step, state, (minibatches, old))
        metrics = _over_steps(per_step)
        metrics["update/flops"] += old_flops.sum()

    metrics["parameters/norm"] = optax.tree.norm(state.params)
    if state.average is not None:
        state = state._replace(average=moving_average(state.average, state.params, objective.baseline_decay))
    return if_finite(metrics, state, initial), metrics


def if_finite(metrics: dict[str, jax.Array], new: TrainState, old: TrainState) -> TrainState:
    """Return `new` if every metric is finite, else `old`.

    The metrics include norms of the gradient and the update, which are not finite if any of their numbers is not.
    """
    return keep_if(jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all(), new, old)


def keep_if(condition: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return `new` if the condition holds, else `old`."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def moving_average(average: Params, params: Params, baseline_decay: float) -> Params:
    """Return τ φ + (1 - τ) θ for the decay τ, the average φ and the parameters θ (RLP, 2510.01265)."""
    return jax.tree.map(lambda a, p: baseline_decay * a + (1.0 - baseline_decay) * p, average, params)


def _over_steps(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the metrics of several optimizer steps as one: sums of counts, the maximum of maxima, and else means.

    Steps that were skipped have no part in the means, unless all were.
    """
    skipped = metrics["update/skipped"] > 0
    weights = jnp.where(skipped.all(), True, ~skipped)
    means = {name: jnp.sum(values * weights) / weights.sum() for name, values in metrics.items()}
    sums = {name: metrics[name].sum() for name in SUMMED_METRICS}
    return means | sums | {"mismatch/max": metrics["mismatch/max"].max()}
