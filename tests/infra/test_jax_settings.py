"""JAX's own settings: a run has those that it needs, and the user's come back after it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.infra.jax_settings import needed_jax_settings

USERS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
}


@pytest.fixture
def users_settings() -> Iterator[None]:
    earlier = {name: getattr(jax.config, name) for name in USERS}
    for name, value in USERS.items():
        jax.config.update(name, value)
    yield
    for name, value in earlier.items():
        jax.config.update(name, value)


def test_other_settings_are_named_and_come_back(users_settings: None, caplog: pytest.LogCaptureFixture) -> None:
    with needed_jax_settings():
        x = jnp.arange(3)
        assert x.dtype == jnp.int32
        assert (jnp.ones((2, 3)) + x.astype(jnp.uint8) + x).dtype == jnp.float32
    assert {name: getattr(jax.config, name) for name in USERS} == USERS
    assert [record.getMessage().partition("=")[0] for record in caplog.records] == [name.upper() for name in USERS]


def test_the_usual_settings_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with needed_jax_settings():
        pass
    assert not caplog.records
