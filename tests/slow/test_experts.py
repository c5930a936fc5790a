"""Policies with experts: the update against full sequences, several devices, the routing of sampler and update, and a run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax import main
from rpt_jax.bench import __main__ as bench
from rpt_jax.config import ObjectiveConfig
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.model.lora import Lora, join_adapters, split_adapters
from rpt_jax.model.transformer import Params, Transformer, apply_with_routing, head, prefill
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.gradient import policy_gradient
from rpt_jax.pretrain import mixed_loss
from rpt_jax.weights.hf import load_policy, save_policy
from rpt_jax.weights.hf_config import FINGERPRINT_KEY, read_json_object
from tests.helpers import dense_objective
from tests.helpers.benches import run_bench
from tests.helpers.dense_objective import HIGH, LOW, TEMPERATURE, G, P, S, T
from tests.helpers.metrics_page import explained, written
from tests.helpers.paths import TINY
from tests.helpers.policy_reference import MOE_SHAPE, random_params
from tests.helpers.runs import PRETRAIN, SHORT, experiment
from tests.helpers.sharded_results import Results, assert_equal_steps, assert_shardings_kept, run_on_meshes

pytestmark = pytest.mark.slow

POLICY = Transformer(MOE_SHAPE)
PARAMS = random_params(POLICY, 0)
WEIGHT = 0.3
OBJECTIVE = ObjectiveConfig(clip_low=LOW, clip_high=HIGH, balance_weight=WEIGHT)
LIMITS = UpdateLimits(
    minibatches=1, rows=1, microbatch_tokens=24, logit_chunk_tokens=16, temperature=TEMPERATURE, max_new_tokens=T
)
MESHES = ["1x4x2x1", "2x4x1x2"]


# --- the update ---


def dense_loss(params: Params, batch: UpdateBatch, old: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of full sequences, one for each response, and its load-balancing term and the experts' shares."""
    sequences = np.zeros((P * G, 1, S + T), np.int32)
    for row, (p, g) in enumerate(np.ndindex(P, G)):
        sequence = [*batch.prompts_PxS[p, : batch.lengths_P[p]], *batch.tokens_PxGxT[p, g]]
        sequences[row, 0, : len(sequence)] = sequence
    positions = jnp.broadcast_to(jnp.arange(S + T, dtype=jnp.int32), sequences.shape)
    (hidden, _), routing = apply_with_routing(POLICY, params, sequences, positions)

    # The tokens that predict those of the responses.
    index_BxT = np.repeat(np.asarray(batch.lengths_P), G)[:, None] + np.arange(T) - 1
    rows_Bx1 = np.arange(P * G)[:, None]
    tokens_BxT = np.asarray(batch.tokens_PxGxT).reshape(-1, T)
    mask_BxT = np.asarray(batch.mask_PxGxT).reshape(-1, T)
    logits = hidden[rows_Bx1, 0, index_BxT] @ head(POLICY, params).matrix_VxD.T / TEMPERATURE
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BxT[..., None], axis=-1)[..., 0]
    ratio = jnp.exp(logprobs - old.reshape(-1, T))
    advantages = jnp.asarray(batch.advantages_PxG).reshape(-1, 1)
    clipped = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantages)

    balance, shares = jnp.float32(0), []
    for layer in range(MOE_SHAPE.layers):
        experts, _, probabilities = (x[layer][rows_Bx1, 0, index_BxT] for x in routing)
        counts = jnp.zeros(MOE_SHAPE.experts).at[experts[mask_BxT].reshape(-1)].add(1)
        shares.append(counts / counts.sum())
        balance += MOE_SHAPE.experts * jnp.sum(shares[-1] * probabilities[mask_BxT].mean(axis=0)) / MOE_SHAPE.layers
    loss = jnp.sum(jnp.where(mask_BxT, clipped, 0)) / mask_BxT.sum() + WEIGHT * balance
    return loss, {"balance": balance, "shares": jnp.stack(shares)}


@pytest.fixture(scope="module")
def batch() -> UpdateBatch:
    return dense_objective.make_batch()


@pytest.fixture(scope="module")
def old() -> np.ndarray:
    return (-3 + 0.4 * np.random.default_rng(1).standard_normal((P, G, T))).astype(np.float32)


@pytest.fixture(scope="module")
def expected(batch: UpdateBatch, old: np.ndarray):
    return jax.jit(jax.value_and_grad(lambda params: dense_loss(params, batch, old), has_aux=True))(PARAMS)


@pytest.mark.parametrize(("rows", "microbatch_tokens"), [(1, S - 1 + T), (2, 17), (1, 1000)])
def test_the_gradient_equals_that_of_full_sequences(batch, old, expected, rows: int, microbatch_tokens: int) -> None:
    """The size of the packed rows and the tokens in the padding do not change the gradient."""
    real = np.arange(S) < batch.lengths_P[:, None]
    poisoned = batch._replace(
        prompts_PxS=np.where(real, batch.prompts_PxS, 7), tokens_PxGxT=np.where(batch.mask_PxGxT, batch.tokens_PxGxT, 9)
    )
    limits = dataclasses.replace(LIMITS, rows=rows, microbatch_tokens=microbatch_tokens)
    gradient = jax.jit(policy_gradient, static_argnums=(0, 1, 2))
    grads, metrics = gradient(POLICY, OBJECTIVE, limits, PARAMS, poisoned, old)
    (loss, parts), dense_grads = expected
    np.testing.assert_allclose(metrics["loss/policy"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/balance"], parts["balance"], rtol=1e-5)
    shares = np.asarray(parts["shares"])
    np.testing.assert_allclose(metrics["experts/busiest"], (shares.max(axis=1) * MOE_SHAPE.experts).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["experts/unused"], (shares == 0).mean())
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(dense_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, dense_grads)
    without = dataclasses.replace(OBJECTIVE, balance_weight=0.0)
    router = gradient(POLICY, without, limits, PARAMS, poisoned, old)[0]["layers"]["router"]
    assert np.abs(router - grads["layers"]["router"]).max() > 1e-3, "the term hardly matters"


def test_remat_changes_neither_outputs_nor_gradients() -> None:
    tokens = np.random.default_rng(1).integers(0, MOE_SHAPE.vocab, (3, 6)).astype(np.int32)
    weights = np.random.default_rng(4).standard_normal((3, 6, MOE_SHAPE.width))

    @jax.jit
    def both(params: Params):
        def loss(params: Params, policy: Transformer) -> jax.Array:
            return jnp.sum(prefill(policy, params, tokens, np.array([1, 4, 6], np.int32))[0] * weights)

        return [jax.value_and_grad(loss)(params, POLICY.clone(remat=remat)) for remat in ("none", "dots", "full")]

    first, *others = both(PARAMS)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), first, other)


def test_adapters_of_attention_are_trained_beside_frozen_experts() -> None:
    """In bfloat16, in which the frozen weights are stored."""
    policy = POLICY.clone(lora=Lora(rank=2, alpha=4.0, targets=("q", "o")), dtype=jnp.dtype("bfloat16"))
    frozen, adapters = split_adapters(random_params(policy, 0))
    assert frozen["layers"]["gate"].dtype == frozen["layers"]["router"].dtype == jnp.bfloat16
    assert set(adapters["layers"]) == {f"{name}_lora_{half}" for name in "qo" for half in "ab"}
    tokens = np.random.default_rng(1).integers(0, MOE_SHAPE.vocab, (3, 6)).astype(np.int32)

    @jax.jit
    @jax.grad
    def gradient(adapters: Params) -> jax.Array:
        return jnp.sum(prefill(policy, join_adapters(frozen, adapters), tokens, np.array([1, 4, 6], np.int32))[0] ** 3)

    grads = gradient(adapters)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


# --- pre-training ---


def test_the_load_of_windows_and_traces_is_balanced_together() -> None:
    """Two traces in a row continue the first four and the first two tokens of a window."""
    rng = np.random.default_rng(3)
    window, *traces = (rng.integers(0, MOE_SHAPE.vocab, size) for size in (6, 3, 2))
    counts_in_loss = np.array([False, True, True, True, True, False])
    batch = {
        "inputs": window[None],
        "targets": np.zeros((1, 6), np.int32),
        "mask": counts_in_loss[None],
        "trace_inputs": np.array([[[*traces[0], *traces[1], 0]]]),
        "trace_targets": np.zeros((1, 1, 6), np.int32),
        "trace_mask": counts_in_loss[None, None],
        "trace_segment": np.array([[[1, 1, 1, 2, 2, 0]]]),
        "trace_prefix": np.array([[[4, 4, 4, 2, 2, 0]]]),
        "trace_position": np.array([[[4, 5, 6, 2, 3, 0]]]),
    }
    # The same tokens in sequences of their own.
    sequences = [(window, [1, 2, 3, 4]), ([*window[:4], *traces[0]], [5, 6]), ([*window[:2], *traces[1]], [2, 3])]

    def balance(params: Params) -> tuple[jax.Array, jax.Array]:
        """Return the load-balancing loss, and the experts' shares."""
        routings = []
        for tokens, counted in sequences:
            _, routing = apply_with_routing(POLICY, params, np.array([[tokens]]), np.arange(len(tokens))[None, None])
            routings.append(jax.tree.map(lambda x, counted=counted: x[:, 0, 0, np.array(counted)], routing))
        experts, _, probabilities = (jnp.concatenate(x, axis=1) for x in zip(*routings, strict=True))
        shares_LxE = jnp.stack([(experts == e).mean(axis=(1, 2)) for e in range(MOE_SHAPE.experts)], axis=1)
        return MOE_SHAPE.experts * jnp.sum(shares_LxE * probabilities.mean(axis=1), axis=1).mean(), shares_LxE

    def loss(params: Params, weight: float) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mixed_loss(POLICY, params, batch, weights=(1.0, 1.0), balance_weight=weight, logit_chunk_tokens=16)

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (with_term, metrics), (without, _) = gradient(PARAMS, WEIGHT), gradient(PARAMS, 0.0)
    (expected, shares_LxE), expected_gradient = jax.jit(jax.value_and_grad(balance, has_aux=True))(PARAMS)
    np.testing.assert_allclose(metrics["loss/balance"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["experts/busiest"], (shares_LxE.max(axis=1) * MOE_SHAPE.experts).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["experts/unused"], (shares_LxE == 0).mean())
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a - b, WEIGHT * c, atol=1e-4), with_term, without, expected_gradient
    )
    assert np.abs(expected_gradient["layers"]["router"]).max() > 1e-2, "the term hardly matters"


def test_pretraining_writes_the_metrics_of_experts(tmp_path: Path) -> None:
    fields = PRETRAIN | {"policy.preset": "tiny-moe", "objective.balance_weight": 0.01, "training.total_steps": 1}
    main.run(experiment("pretrain_tiny", **fields), tmp_path)
    assert written(tmp_path) - explained("pretrain") == explained("experts")


# --- several devices ---


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_meshes(tmp_path_factory.mktemp("sharded") / "out.npz", *MESHES, option="--experts")


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(results: Results, mesh: str) -> None:
    assert_equal_steps(results, mesh)
    assert_shardings_kept(results, mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_are_stored_once_per_replica(results: Results, mesh: str) -> None:
    data, _, tensor, _ = map(int, mesh.split("x"))
    for name, copies in (("gate", data), ("down", data), ("router", data * tensor)):
        stored = f"stored.params.layers.{name}"
        assert results[mesh][stored] == results["1x1x1x1"][stored] * copies, name


# --- routing in the sampler and in the update ---


def test_sampler_and_update_route_alike_in_float32(tmp_path: Path) -> None:
    options = ["--random-prompts=2", "--samples=2", "--prompt-tokens=9", "--max-new-tokens=12"]
    [exact] = run_bench(tmp_path, "routing", *options)
    assert exact["tokens"] == 2 * 2 * 11 and exact["layers"] == 4
    assert exact["different_routers"] == exact["tokens_with_a_different_router"] == 0
    [rounded] = run_bench(tmp_path, "routing", *options, "--dtype=bfloat16")
    assert rounded["different_routers"] <= rounded["tokens_with_a_different_router"] < 0.5


def test_a_policy_without_experts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["bench", "routing", "--preset=tiny"]) == 2
    assert "no experts" in capsys.readouterr().err


# --- a run ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose policy is configs/tiny with the feed-forward layer in several experts of random weights."""
    root = tmp_path_factory.mktemp("experts")
    source = Path(shutil.copytree(TINY, root / "policy"))
    config, params, _ = load_policy(source)
    config = dataclasses.replace(
        config, ffn=48, qk_norm=True, experts=6, experts_per_token=2, normalize_expert_weights=True
    )
    fresh = random_params(Transformer(config), 0)
    fresh["layers"] = {
        name: params["layers"].get(name, x) if name not in ("gate", "up", "down") else 0.2 * x
        for name, x in fresh["layers"].items()
    }
    fingerprint = str(read_json_object(source / "config.json")[FINGERPRINT_KEY])
    save_policy(source, config, params | {"layers": fresh["layers"]}, {}, fingerprint)
    fields = {
        "policy.path": source,
        "policy.preset": "",
        "objective.balance_weight": 0.01,
        "training.minibatches_per_step": 2,
        "training.total_steps": 2,
    }
    main.run(experiment(**SHORT | fields), root / "run")
    return root / "run"


def test_a_run_trains_the_experts(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")[1:]
    assert all(line["mismatch/max"] < 1e-4 for line in lines), "sampler and trainer differ"
    assert all(line["gradient/norm"] > 0 and line["experts/busiest"] >= 1 for line in lines)
    config, params, _ = load_policy(finished / "policy")
    before = load_policy(finished.parent / "policy")[1]
    assert config.experts == 6
    assert all((params["layers"][name] != before["layers"][name]).any() for name in ("router", "gate", "up", "down"))


def test_the_page_explains_the_keys_of_a_policy_with_experts(finished: Path) -> None:
    assert written(finished) - explained("rpt") == explained("experts")
