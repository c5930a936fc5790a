"""What command-line tools set in the environment."""

from __future__ import annotations

import pytest

from rpt_jax.infra.command_line import set_memory_fraction


@pytest.mark.parametrize(
    "name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"]
)
def test_the_memory_that_the_environment_gives_to_jax_stays(name: str) -> None:
    environment = {name: "0.5"}
    set_memory_fraction(environment)
    assert environment == {name: "0.5"}


def test_jax_gets_most_of_the_memory() -> None:
    environment: dict[str, str] = {}
    set_memory_fraction(environment)
    assert environment == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
