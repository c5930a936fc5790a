"""Low-rank adapters: their parameters, and the fields of the config. tests/slow/test_lora.py has what compiles programs."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.errors import UserError
from rpt_jax.model.lora import Lora, lora_of, matrix_sizes, split_adapters
from tests.helpers.policy_reference import SHALLOW, random_params

LORA = Lora(rank=3, alpha=6.0, targets=("q", "k", "o", "gate", "down"))


def test_the_number_of_parameters() -> None:
    frozen, adapters = split_adapters(random_params(SHALLOW.clone(lora=LORA), 0))
    assert LORA.parameters(SHALLOW.config) == sum(x.size for x in jax.tree.leaves(adapters))
    sizes = matrix_sizes(SHALLOW.config)
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
