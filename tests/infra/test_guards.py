"""Guards of the training loop: repeated compilation is reported, and implicit transfers raise."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.infra.guards import COMPILATION_LOGGER, COMPILATION_MESSAGE, guarded_loop


@jax.jit
def doubled(x_N: jax.Array, y_N: jax.Array) -> jax.Array:
    return 2 * x_N + y_N.sum()


def test_a_program_that_is_compiled_again_is_reported_with_the_shapes_that_changed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with guarded_loop() as again:
        arrays = {size: jax.device_put(np.ones(size, np.float32)) for size in (2, 3, 5)}
        doubled(arrays[2], arrays[2])
        doubled(arrays[3], arrays[2])
        assert again() == [], "the first step may compile programs for several shapes"
        doubled(arrays[2], arrays[2])
        assert again() == []
        doubled(arrays[5], arrays[2])
        [sentence] = again()
        assert "doubled" in sentence and "for other shapes (argument 0: float32[3] -> float32[5])" in sentence
        assert again() == []
    doubled(jnp.ones(7), jnp.ones(7))
    assert again() == [] and logging.getLogger(COMPILATION_LOGGER).level == logging.NOTSET
    assert capfd.readouterr() == ("", ""), "JAX's debug messages are hidden"


def test_a_new_program_is_not_reported() -> None:
    with guarded_loop() as again:
        again()
        jax.jit(lambda x: x - 1)(jax.device_put(np.ones(3)))
        assert again() == []


def test_the_first_use_of_an_option_is_not_reported() -> None:
    flipped = jax.jit(lambda x, flip: -x if flip else x, static_argnames="flip")
    x = jax.device_put(np.ones(3))
    with guarded_loop() as again:
        flipped(x, flip=False)
        again()
        flipped(x, flip=True)
        assert again() == []


def test_operations_outside_of_programs_are_not_reported() -> None:
    with guarded_loop() as again:
        for size in (4, 5, 6):
            jax.lax.neg(jax.device_put(np.ones(size)))
            assert again() == []


@pytest.mark.parametrize("program", ["jit(_device_put_reshard)", "jit(_identity_fn)", "jit(_psum)"])
def test_the_programs_that_move_arrays_between_processes_are_not_reported(program: str) -> None:
    """A run of several processes gathers arrays of many shapes."""
    logger = logging.getLogger(COMPILATION_LOGGER)
    with guarded_loop() as again:
        for shape in ("float32[2]", "float32[3]", "int32[4,5]"):
            logger.debug(f"{COMPILATION_MESSAGE} and types %s.", program, (shape,), ("sharding",))
            assert again() == []
        for shape, count in (("float32[2]", 0), ("float32[3]", 1)):
            logger.debug(f"{COMPILATION_MESSAGE} and types %s.", "jit(ours)", (shape,), ("sharding",))
            assert len(again()) == count


def test_another_sharding_is_reported() -> None:
    x = jax.device_put(np.ones(3))
    committed = jax.device_put(x, jax.devices()[0])
    with guarded_loop() as again:
        doubled(x, x)
        again()
        doubled(committed, x)
        assert [sentence for sentence in again() if "doubled" in sentence and "other shardings" in sentence]


def test_implicit_transfers_raise() -> None:
    with guarded_loop():
        x = jax.device_put(np.ones(3, np.float32))
        assert jax.device_get(x).sum() == 3
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            doubled(np.ones(4, np.float32), x)
    doubled(np.ones(4, np.float32), x)


def test_jax_still_logs_compilations_under_the_private_name_that_the_guard_reads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If this fails after an update of JAX, adapt the logger and the text in infra/guards.py."""
    with caplog.at_level(logging.DEBUG, logger=COMPILATION_LOGGER):
        jax.jit(lambda x: x * 5 - 3)(jax.device_put(np.ones(11, np.float32)))
    records = [record for record in caplog.records if str(record.msg).startswith(COMPILATION_MESSAGE)]
    assert [str(shape) for record in records for shape in record.args[1]] == ["float32[11]"]
