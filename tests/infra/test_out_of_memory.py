"""A device that runs out of memory ends a run with a sentence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra.out_of_memory import explain_out_of_memory

FIELDS = {"training.microbatch_tokens": 16384, "policy.remat": "dots"}


def test_an_allocation_that_fails_names_program_size_and_fields():
    with pytest.raises(
        UserError, match=r"in the update, which asked for 3725290\.30 GiB\. .*\(now 16384\).*\(now dots\)"
    ) as raised:
        with explain_out_of_memory("the update", FIELDS):
            jax.block_until_ready(jnp.zeros(10**15, jnp.float32))
    assert raised.value.field == "training.microbatch_tokens"


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("Out of memory while trying to allocate 17179869184 bytes.", "16.00 GiB"),
        ("Out of memory while trying to allocate 1.50GiB.", "1.50GiB"),
        ("Attempting to allocate 2.01G. That was not possible. There are 0.98G free.", "2.01G"),
        (
            "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            "20.5G of 15.75G",
        ),
    ],
)
def test_the_messages_of_every_backend_are_read(message: str, asked: str):
    with pytest.raises(UserError) as raised, explain_out_of_memory("sampling", FIELDS):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    assert f"in sampling, which asked for {asked}. " in str(raised.value)


def test_the_mesh_fields_are_those_that_split_the_program():
    """Rollouts have a tensor-parallel size of their own."""
    with pytest.raises(UserError) as raised, explain_out_of_memory("sampling", FIELDS, ["mesh.rollout_tensor"]):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no numbers here")
    assert "(mesh.rollout_tensor)" in str(raised.value) and "mesh.tensor" not in str(raised.value)


def test_a_message_without_a_size_is_still_a_sentence_and_other_errors_are_raised():
    with pytest.raises(UserError, match=r"in sampling\. Change"), explain_out_of_memory("sampling", FIELDS):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no numbers here")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory("sampling", FIELDS):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
