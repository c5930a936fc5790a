"""Mixture of experts: the layer against one that runs every expert on every token, its gradient, and the load-balancing loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import from_config_dict
from rpt_jax.errors import UserError
from rpt_jax.model import experts
from rpt_jax.model.experts import (
    ExpertMatrices,
    Routing,
    balance_terms,
    expert_counts,
    expert_shares,
    route,
    run_experts,
    run_local_experts,
)
from rpt_jax.model.grouped_matmul import grouped_matmul
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.sizes.policy import model_config_of
from tests.helpers.policy_reference import MOE_SHAPE

E, A, D, F = MOE_SHAPE.experts, MOE_SHAPE.experts_per_token, MOE_SHAPE.width, MOE_SHAPE.ffn
RNG = np.random.default_rng(0)
X_NxGxQxD = jnp.asarray(RNG.standard_normal((2, 1, 9, D)), jnp.float32)
ROUTER_DxE = jnp.asarray(RNG.standard_normal((D, E)), jnp.float32)
MATRICES = ExpertMatrices(
    *(jnp.asarray(0.3 * RNG.standard_normal(dims), jnp.float32) for dims in ((E, D, F), (E, D, F), (E, F, D)))
)


def mixture(x: jax.Array, router: jax.Array, matrices: ExpertMatrices, normalize: bool) -> jax.Array:
    return run_experts(x, route(x, router, A, normalize), matrices)


def dense_mixture(x: jax.Array, router: jax.Array, matrices: ExpertMatrices, normalize: bool) -> jax.Array:
    """Run every expert on every token."""
    probabilities = jax.nn.softmax(x @ router)
    is_chosen = probabilities >= jnp.sort(probabilities)[..., [-A]]
    weights = jnp.where(is_chosen, probabilities, 0)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("ngqd,edf->ngqef", x, matrices.gate_ExDxF))
    hidden *= jnp.einsum("ngqd,edf->ngqef", x, matrices.up_ExDxF)
    return jnp.einsum("ngqef,efd,ngqe->ngqd", hidden, matrices.down_ExFxD, weights)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_layer_and_its_gradient_equal_those_of_all_experts(normalize: bool) -> None:
    directions = jnp.asarray(RNG.standard_normal(X_NxGxQxD.shape), jnp.float32)

    def both(layer) -> tuple[jax.Array, tuple]:
        def loss(x, router, matrices):
            y = layer(x, router, matrices, normalize)
            return jnp.sum(y * directions), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            X_NxGxQxD, ROUTER_DxE, MATRICES
        )
        return y, gradients

    ours, theirs = both(mixture), both(dense_mixture)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(ours)), "the example tests too little"


@pytest.mark.parametrize("poison", [7.0, np.nan])
def test_undefined_rows_of_grouped_products_are_never_used(monkeypatch: pytest.MonkeyPatch, poison: float) -> None:
    """With the experts split over two devices, which leaves the rows of the other device's experts without a group."""

    @jax.custom_vjp
    def poisoned(rows, matrices, sizes):
        return forward(rows, matrices, sizes)[0]

    def fill(rows, sizes):
        return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], rows, poison)

    def forward(rows, matrices, sizes):
        product, backward = jax.vjp(lambda rows, matrices: grouped_matmul(rows, matrices, sizes), rows, matrices)
        return fill(product, sizes), (backward, sizes)

    def backward(saved, gradient):
        inner, sizes = saved
        rows, matrices = inner(gradient)
        return fill(rows, sizes), matrices, None

    poisoned.defvjp(forward, backward)
    monkeypatch.setattr(experts, "grouped_matmul", poisoned)

    def split_mixture(x, router, matrices):
        routing = route(x, router, A, normalize=False)
        parts = (slice(0, 2), slice(2, E))
        return sum(
            run_local_experts(
                x, routing.experts, routing.weights, jax.tree.map(lambda m, part=part: m[part], matrices), part.start
            )
            for part in parts
        )

    def gradients(layer):
        return jax.grad(lambda *inputs: jnp.sum(jnp.sin(layer(*inputs))), argnums=(0, 1, 2))(
            X_NxGxQxD, ROUTER_DxE, MATRICES
        )

    expected = gradients(lambda *inputs: dense_mixture(*inputs, normalize=False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients(split_mixture), expected
    )


def test_a_token_does_not_depend_on_others() -> None:
    """Not even if they are not finite."""
    layer = jax.jit(mixture, static_argnums=3)
    is_poison = jnp.arange(9)[:, None] > 5
    poisoned = layer(jnp.where(is_poison, jnp.nan, X_NxGxQxD), ROUTER_DxE, MATRICES, True)
    np.testing.assert_array_equal(poisoned[:, :, :6], layer(X_NxGxQxD, ROUTER_DxE, MATRICES, True)[:, :, :6])


# --- load balancing ---


def random_routing(seed: int) -> Routing:
    """Return the routing of tokens [2 layers, 3, 4]."""
    x = jax.random.normal(jax.random.key(seed), (2, 3, 4, D))
    return route(x, ROUTER_DxE, A, normalize=True)


def test_only_counted_tokens_are_counted() -> None:
    routing, counted_NxW = random_routing(1), RNG.random((3, 4)) < 0.5
    expected = np.zeros((2, E), int)
    for layer, n, w in np.ndindex(2, 3, 4):
        if counted_NxW[n, w]:
            expected[layer, np.asarray(routing.experts[layer, n, w])] += 1
    np.testing.assert_array_equal(expert_counts(routing, jnp.asarray(counted_NxW)), expected)
    assert expected.sum() == 2 * A * counted_NxW.sum()


def test_the_load_balancing_loss_and_its_gradient() -> None:
    """Equation 4 of the Switch Transformer, for each layer, from all tokens."""
    routing = random_routing(2)
    counts_LxE = np.asarray(expert_counts(routing, jnp.ones((3, 4), bool)))
    probabilities = np.asarray(routing.probabilities, np.float64)
    per_layer = [
        E * np.sum(counts / counts.sum() * p.mean((0, 1))) for counts, p in zip(counts_LxE, probabilities, strict=True)
    ]

    shares_LxE = expert_shares(jnp.asarray(counts_LxE))

    def loss(probabilities: jax.Array) -> jax.Array:
        return balance_terms(routing._replace(probabilities=probabilities), shares_LxE).mean()

    value, gradient = jax.value_and_grad(loss)(routing.probabilities)
    np.testing.assert_allclose(value, np.mean(per_layer), rtol=1e-5)
    # Each of the 12 tokens of a layer, of which there are 2, has the same gradient.
    expected = E * counts_LxE / counts_LxE.sum(axis=1, keepdims=True) / 12 / 2
    np.testing.assert_allclose(gradient, np.broadcast_to(expected[:, None, None], gradient.shape), rtol=1e-5)
    assert counts_LxE.std() > 0, "the example is balanced"


def test_a_balanced_load_has_a_loss_of_one() -> None:
    uniform = Routing(experts=jnp.zeros(()), weights=jnp.zeros(()), probabilities=jnp.full((2, 3, 4, E), 1 / E))
    np.testing.assert_allclose(balance_terms(uniform, jnp.full((2, E), 1 / E)), 1, rtol=1e-6)
    np.testing.assert_array_equal(expert_shares(jnp.zeros((2, E), jnp.int32)), 0)


# --- fields of the config ---


def test_presets_have_the_sizes_that_their_names_say() -> None:
    for name, total, active in (("qwen3-30b-a3b", 30.5e9, 3.3e9), ("qwen3-235b-a22b", 235e9, 22e9)):
        config = preset(name)
        embedding = config.vocab * config.width
        assert config.parameters == pytest.approx(total, rel=0.01)
        assert config.matmul_parameters + embedding == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize(
    "fields", [{"experts_per_token": 6}, {"experts_per_token": 0}, {"experts": 0}, {"qk_norm": False}], ids=str
)
def test_sizes_that_no_model_can_have_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="experts"):
        dataclasses.replace(MOE_SHAPE, **fields)


@pytest.mark.parametrize(
    ("preset_name", "overrides", "field"),
    [
        ("tiny-moe", ["policy.lora.rank=4"], "policy.lora.targets"),
        ("tiny-moe", ["policy.lora.rank=4", "policy.lora.targets=q_proj,down_proj"], "policy.lora.targets"),
        ("tiny", ["objective.balance_weight=0.1"], "objective.balance_weight"),
    ],
)
def test_fields_that_do_not_suit_the_policy_are_refused(preset_name: str, overrides: list[str], field: str) -> None:
    config = {"policy": {"preset": preset_name, "path": "not here"}}
    with pytest.raises(UserError) as raised:
        model_config_of(from_config_dict(config, overrides))
    assert raised.value.field == field


@pytest.mark.parametrize(
    "overrides", [["policy.lora.rank=4", "policy.lora.targets=q_proj"], ["objective.balance_weight=0.1"]]
)
def test_fields_that_suit_the_policy_are_accepted(overrides: list[str]) -> None:
    config = {"policy": {"preset": "tiny-moe", "path": "not here"}}
    assert isinstance(model_config_of(from_config_dict(config, overrides))[0], ModelConfig)
