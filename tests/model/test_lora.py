"""Low-rank adapters against a policy whose matrices hold them."""

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
from rpt_jax.model.lora import Lora, join_adapters, lora_of, matrix_sizes, split_adapters
from rpt_jax.model.transformer import Params, head, in_compute_dtype, prefill
from tests.helpers.policy_reference import SHALLOW, random_params

# Not all matrices, so that one without adapters is tested, too.
LORA = Lora(rank=3, alpha=6.0, targets=("q", "k", "o", "gate", "down"))
POLICY = SHALLOW.clone(lora=LORA)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SHALLOW.config.vocab, (2, 6)), jnp.int32)
LENGTHS = jnp.array([6, 6])


def merged(frozen: Params, adapters: Params) -> Params:
    """Return the dense parameters W + alpha / rank · A B of every matrix with adapters."""
    layers = dict(frozen["layers"])
    for name in LORA.targets:
        a = adapters["layers"][f"{name}_lora_a"]
        b = adapters["layers"][f"{name}_lora_b"]
        product = jnp.einsum("lir,lro->lio", a.reshape(len(a), -1, LORA.rank), b.reshape(len(b), LORA.rank, -1))
        layers[name] = layers[name] + LORA.alpha / LORA.rank * product.reshape(layers[name].shape)
    return frozen | {"layers": layers}


def loss(policy, params: Params) -> jax.Array:
    """Return a number that depends on every logit."""
    hidden, _, _ = prefill(policy, params, TOKENS, LENGTHS)
    logits = hidden @ head(policy, params).matrix_VxD.T
    return jnp.sum(jnp.sin(logits))


def test_values_and_gradients_equal_those_of_merged_matrices() -> None:
    frozen, adapters = split_adapters(random_params(POLICY, 0))
    assert set(adapters["layers"]) == {f"{name}_lora_{half}" for name in LORA.targets for half in "ab"}

    def with_adapters(adapters: Params) -> jax.Array:
        return loss(POLICY, join_adapters(frozen, adapters))

    def with_merged(adapters: Params) -> jax.Array:
        return loss(SHALLOW, merged(frozen, adapters))

    ours, theirs = (jax.jit(jax.value_and_grad(fn))(adapters) for fn in (with_adapters, with_merged))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    assert abs(ours[0] - loss(SHALLOW, frozen)) > 0.1, "the adapters hardly change the policy"
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), ours[1], theirs[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_policy_is_exactly_its_base(dtype: str) -> None:
    """Its base is stored once, in the dtype of decoding, which copies nothing but the adapters."""
    policy = POLICY.clone(dtype=jnp.dtype(dtype), head_precision=dtype)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = init_parameters(policy, mesh, seed=0)
    frozen, adapters = split_adapters(params)
    hidden, base_hidden = (
        prefill(p, x, TOKENS, LENGTHS)[0] for p, x in ((policy, params), (policy.clone(lora=None), frozen))
    )
    np.testing.assert_array_equal(hidden, base_hidden)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
    assert frozen["layers"]["q"].dtype == frozen["embedding"].dtype == jnp.dtype(dtype)
    reshard = make_reshard_fn(policy, mesh, lambda params: in_compute_dtype(policy, params))
    decoding, _ = split_adapters(reshard(params) if reshard else params)
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
