"""AdamW with gradient clipping and a learning-rate schedule."""

from __future__ import annotations

import functools

import jax
import optax

from rpt_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warmup, then constant (verl's default) or cosine decay to a tenth.

    The n steps of the warmup have 1, 2, …, n parts of n + 1 of the peak, which the step after them has: no step is wasted on a
    learning rate of 0.
    """
    peak = config.learning_rate
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, total_steps - config.warmup_steps), alpha=0.1)
    else:
        main = optax.constant_schedule(peak)
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, main], [config.warmup_steps])


class LearningRates:
    """Tells the learning rate of the next optimizer step.

    Args:
      config: section `optimizer`.
      total_steps: optimizer steps of the whole run.
    """

    def __init__(self, config: OptimizerConfig, total_steps: int):
        self._schedule = jax.jit(make_schedule(config, total_steps))

    def next(self, state: optax.OptState) -> float:
        """Return the learning rate that the next step of an optimizer with this state takes."""
        _, count = optax.tree.get_all_with_path(state, "count")[0]
        return float(jax.device_get(self._schedule(count)))


# Cached, because compiled programs are keyed by the identity of their optimizer: equal arguments must return the same object, or
# every run in a process would compile its update again.
@functools.cache
def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Return AdamW after a clip of the global gradient norm (paper, Table 5)."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        ),
    )
