"""Low-rank adapters: where a policy starts, how it is stored, and the fields of the config."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.sharding import init_parameters, make_reshard_fn
from rpt_jax.errors import UserError
from rpt_jax.model.lora import Lora, lora_of, matrix_sizes, split_adapters
from rpt_jax.model.transformer import in_compute_dtype, prefill
from tests.helpers.policy_reference import SHALLOW, random_params

# Not all matrices, so that one without adapters is tested, too.
LORA = Lora(rank=3, alpha=6.0, targets=("q", "k", "o", "gate", "down"))
POLICY = SHALLOW.clone(lora=LORA)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SHALLOW.config.vocab, (2, 6)), jnp.int32)
LENGTHS = jnp.array([6, 6])


def test_a_new_policy_is_exactly_its_base() -> None:
    """Its base is stored in the dtype of decoding, which then copies nothing but the adapters."""
    policy = POLICY.clone(dtype=jnp.dtype("bfloat16"), head_precision="bfloat16")
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = init_parameters(policy, mesh, seed=0)
    frozen, adapters = split_adapters(params)
    hidden, base_hidden = (
        prefill(p, x, TOKENS, LENGTHS)[0] for p, x in ((policy, params), (policy.clone(lora=None), frozen))
    )
    np.testing.assert_array_equal(hidden, base_hidden)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
    assert frozen["layers"]["q"].dtype == frozen["embedding"].dtype == jnp.bfloat16
    reshard = make_reshard_fn(policy, mesh, lambda params: in_compute_dtype(policy, params))
    assert reshard is not None
    decoding, _ = split_adapters(reshard(params))
    assert all(x is y for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(decoding), strict=True))


def test_the_number_of_parameters() -> None:
    _, adapters = split_adapters(random_params(POLICY, 0))
    assert LORA.parameters(SHALLOW.config) == sum(x.size for x in jax.tree.leaves(adapters))
    sizes = matrix_sizes(SHALLOW.config)
    frozen, _ = split_adapters(random_params(POLICY, 0))
    assert {name: int(np.prod(sizes[name])) for name in sizes} == {
        name: frozen["layers"][name][0].size for name in sizes
    }


def with_lora(*overrides: str, **fields: object) -> Experiment:
    return from_config_dict({"policy": {"path": "a_policy"}, **fields}, [f"policy.lora.{o}" for o in overrides])


def test_adapters_of_a_config() -> None:
    assert lora_of(with_lora()) is None
    chosen = lora_of(with_lora("rank=4", "alpha=8", "targets=v_proj, q_proj"))
    assert chosen == Lora(rank=4, alpha=8.0, targets=("q", "v"))
    everything = lora_of(with_lora("rank=4"))
    assert everything is not None and set(everything.targets) == set(matrix_sizes(SHALLOW.config))
    scoring = dataclasses.replace(with_lora("rank=4"), task="score")
    assert lora_of(scoring) is None, "a task that does not train has no adapters"


@pytest.mark.parametrize(
    ("overrides", "field", "hint"),
    [
        (("rank=4", "targets=q_prj"), "policy.lora.targets", "'q_proj'"),
        (("rank=4", "targets="), "policy.lora.targets", "all"),
        (("rank=4", "targets=all,q_proj"), "policy.lora.targets", "all"),
        (("rank=-1",), "policy.lora.rank", ""),
        (("rank=4", "alpha=0"), "policy.lora.alpha", ""),
        (("alpha=16",), "policy.lora.alpha", "rank"),
        (("targets=q_proj",), "policy.lora.targets", "rank"),
    ],
)
def test_fields_that_cannot_work_are_refused(overrides: tuple[str, ...], field: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        with_lora(*overrides)
    assert raised.value.field == field and hint in str(raised.value)


def test_random_weights_are_not_frozen() -> None:
    with pytest.raises(UserError) as raised:
        with_lora("rank=4", task="pretrain", policy={"path": ""})
    assert raised.value.field == "policy.lora.rank"
