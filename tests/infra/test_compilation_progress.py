"""Messages while a program compiles."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.infra.compilation_progress import COMPILATION_EVENT, CompilationProgress


def test_a_long_compilation_is_reported_with_the_name_of_the_program(caplog: pytest.LogCaptureFixture) -> None:
    """JAX still reports the start and the end of a compilation as this module expects."""
    caplog.set_level(logging.INFO, logger="rpt_jax")

    def slow_program(x: jax.Array) -> jax.Array:
        for _ in range(100):
            x = jnp.sin(x @ x)
        return x

    with CompilationProgress(seconds=1e-3):
        jax.jit(slow_program)(jnp.ones((8, 8)))
    assert "Compiling jit(slow_program) for 0 s" in caplog.text and "Compiled jit(slow_program) in" in caplog.text


def test_a_short_compilation_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    with CompilationProgress(seconds=60.0):
        jax.monitoring.record_scalar(COMPILATION_EVENT, 0.0, fun_name="jit(quick)")
        jax.monitoring.record_event_duration_secs(COMPILATION_EVENT, 1.0, fun_name="jit(quick)")
        jax.monitoring.record_event_duration_secs("/jax/another/event", 100.0, fun_name="jit(other)")
    jax.monitoring.record_event_duration_secs(COMPILATION_EVENT, 100.0, fun_name="jit(after)")
    assert not caplog.records
