"""What a loop may not do unseen."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.infra.guards import guarded_loop


@jax.jit
def doubled(x_N: jax.Array, y_N: jax.Array) -> jax.Array:
    return 2 * x_N + y_N.sum()


def test_programs_that_are_compiled_again_are_named_with_the_shapes_that_changed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with guarded_loop() as again:
        arrays = {size: jax.device_put(np.ones(size, np.float32)) for size in (2, 3, 5)}
        doubled(arrays[2], arrays[2])
        doubled(arrays[3], arrays[2])
        assert again() == [], "the first step may compile what it likes"
        doubled(arrays[2], arrays[2])
        assert again() == []
        doubled(arrays[5], arrays[2])
        [sentence] = again()
        assert "doubled" in sentence and "for other shapes (argument 0: float32[3] -> float32[5])" in sentence
        assert again() == []
    doubled(jnp.ones(7), jnp.ones(7))
    assert again() == [] and logging.getLogger("jax._src.interpreters.pxla").level == logging.NOTSET
    assert capfd.readouterr() == ("", ""), "what JAX logs for us is not shown"


def test_a_program_that_is_new_is_not_compiled_again() -> None:
    with guarded_loop() as again:
        again()
        jax.jit(lambda x: x - 1)(jax.device_put(np.ones(3)))
        assert again() == []


def test_transfers_that_the_code_does_not_name() -> None:
    with guarded_loop():
        x = jax.device_put(np.ones(3, np.float32))
        assert jax.device_get(x).sum() == 3
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            doubled(np.ones(4, np.float32), x)
    doubled(np.ones(4, np.float32), x)
