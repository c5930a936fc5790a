"""The learning-rate schedules and AdamW."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpt_jax.config import OptimizerConfig
from rpt_jax.config.schema import SCHEDULES
from rpt_jax.infra.optimizer import LearningRates, make_optimizer, make_schedule


def test_constant_schedule_with_and_without_warmup():
    schedule = make_schedule(OptimizerConfig(learning_rate=0.3), 100)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 99, 500)], 0.3)
    schedule = make_schedule(OptimizerConfig(learning_rate=0.3, warmup_steps=9), 100)
    rates = [schedule(step) for step in (0, 1, 4, 8, 9, 10, 99)]
    np.testing.assert_allclose(rates, [0.03, 0.06, 0.15, 0.27, 0.3, 0.3, 0.3], rtol=1e-6)


def test_the_first_step_of_a_warmup_learns() -> None:
    for schedule in SCHEDULES:
        for warmup in (1, 2, 50):
            config = OptimizerConfig(learning_rate=0.3, warmup_steps=warmup, schedule=schedule)
            rates = [float(make_schedule(config, 100)(step)) for step in range(warmup + 1)]
            np.testing.assert_allclose(rates, 0.3 * np.arange(1, warmup + 2) / (warmup + 1), rtol=1e-6)


def test_cosine_schedule_ends_at_a_tenth():
    for warmup in (0, 20):
        config = OptimizerConfig(learning_rate=0.3, warmup_steps=warmup, schedule="cosine")
        schedule, middle = make_schedule(config, 100), (100 + warmup) // 2
        np.testing.assert_allclose([schedule(step) for step in (warmup, middle, 100)], [0.3, 0.165, 0.03], rtol=1e-5)
        assert all(schedule(step) > schedule(step + 1) for step in range(warmup, 100))


def test_adamw_equals_the_textbook():
    """Three steps in NumPy, from the textbook: gradient clipping, bias correction and decoupled weight decay."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.05, max_grad_norm=0.2, epsilon=1e-3)
    optimizer, rng = make_optimizer(config, 10), np.random.default_rng(0)
    params = {"a": rng.standard_normal(3, np.float32), "b": rng.standard_normal((2, 2), np.float32)}
    state, ours = optimizer.init(params), params
    m = v = {name: 0.0 for name in params}
    for step in (1, 2, 3):
        scale = np.float32(0.01 if step == 2 else 1)
        grads = {name: scale * rng.standard_normal(x.shape, np.float32) for name, x in params.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert (norm < 0.2) == (step == 2)
        clipped = {name: g * min(1, 0.2 / norm) for name, g in grads.items()}
        m = {name: config.beta1 * m[name] + (1 - config.beta1) * g for name, g in clipped.items()}
        v = {name: config.beta2 * v[name] + (1 - config.beta2) * g**2 for name, g in clipped.items()}
        for name, x in params.items():
            mean, square = m[name] / (1 - config.beta1**step), v[name] / (1 - config.beta2**step)
            params[name] = x - 0.1 * (mean / (np.sqrt(square) + 1e-3) + 0.05 * x)
            np.testing.assert_allclose(ours[name], params[name], rtol=1e-4, atol=1e-6)


def test_the_learning_rate_of_a_step_is_that_of_the_schedule() -> None:
    """Steps that are skipped do not count: the rate follows the optimizer's own count."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine")
    optimizer = make_optimizer(config, 6)
    rates = LearningRates(config, 6)
    params = {"x": jnp.ones(3)}
    state = optimizer.init(params)
    schedule = make_schedule(config, 6)
    for step in range(6):
        assert rates.next(state) == pytest.approx(float(schedule(step)), rel=1e-6)
        _, state = optimizer.update(params, state, params)
