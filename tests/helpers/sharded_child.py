"""Two steps of RL on meshes of eight simulated devices: `python -m tests.helpers.sharded_child out.npz 1x1x1x1 2x2x2x2`.

With `--lora` adapters are trained, and with `--experts` the policy has experts. The sizes of a mesh are data, fsdp, tensor and
rollout_tensor. Meshes of one and of eight devices run two steps, other meshes only sample the first rollouts. This is a separate
process because the number of devices is fixed when JAX starts. It writes its results and checks nothing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import ObjectiveConfig, OptimizerConfig
from rpt_jax.distributed.mesh import make_mesh, num_batch_shards, use_mesh
from rpt_jax.distributed.sharding import init_optimizer, init_parameters, make_reshard_fn, shard_prompts
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.model.lora import Lora, join_adapters, split_adapters
from rpt_jax.model.transformer import Transformer
from rpt_jax.objective.advantage import group_advantages
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.rewards.prefix_match import prefix_match_reward
from rpt_jax.rollout.generate import generate
from rpt_jax.rollout.rollouts import Rollouts
from tests.helpers.policy_reference import MOE_SHAPE, SHALLOW, SHAPE

DEVICES = 8
# A large scale, because B is small after one step.
LORA = Lora(rank=2, alpha=16.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
EXPERTS = Transformer(dataclasses.replace(MOE_SHAPE, layers=1, experts=8))
POLICY = EXPERTS if "--experts" in sys.argv else SHALLOW.clone(lora=LORA) if "--lora" in sys.argv else SHALLOW
# Groups without advantages count, too, if experts are balanced.
OBJECTIVE = ObjectiveConfig(balance_weight=0.1 if POLICY.config.experts else 0.0)
SPLIT_ROWS = (1, 4, 2, 1)  # On this mesh the update splits the tokens of its rows.
P, G, S, T = 8, 4, 6, 6
STOPS = (0, 9, 18, 27, 36)
LIMITS = UpdateLimits(
    minibatches=1, rows=1, microbatch_tokens=16, logit_chunk_tokens=64, temperature=0.8, max_new_tokens=T
)
# A large epsilon, because dividing tiny gradients by their own size would amplify rounding errors.
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, max_grad_norm=1e9), total_steps=2)
# Each token spells a complete answer, so that random tokens are sometimes right; the true continuation is "a", "a".
WORDS = [b"</think>\\boxed{a}", b"</think>\\boxed{aa}", b"</think>\\boxed{b}", b"</think>\\boxed{}", b"ab"]
VOCAB = [b"" if i in STOPS else WORDS[i % len(WORDS)] for i in range(SHAPE.vocab)]
LENGTHS_V = np.array([len(word) for word in VOCAB], np.int32)
BYTES_VxX = np.array([list(word.ljust(LENGTHS_V.max(), b"\0")) for word in VOCAB], np.uint8)
COMPILED: list[str] = []  # One entry for each program that XLA compiles or reads from its cache.
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def prompts() -> tuple[np.ndarray, ...]:
    """Return tokens, lengths, ids, reference and boundaries, with two prompts per document that share a prefix."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, SHAPE.vocab, (P // 2, S)).astype(np.int32).repeat(2, axis=0),
        rng.integers(1, S + 1, P).astype(np.int32),
        np.arange(P, dtype=np.int32),
        np.tile(np.frombuffer(b"aa", np.uint8), (P, 1)),
        np.tile([False, True, True], (P, 1)),
    )


def roll(params: Any, sharded: tuple[jax.Array, ...], seed: int) -> Rollouts:
    """Sample with few slots: they are refilled, and the decode loop is compiled for one batch size only."""
    static = {"samples": G, "max_new_tokens": T, "temperature": 0.8, "stop_ids": STOPS, "slots": 6}
    return generate(POLICY, params, *sharded[:3], jax.random.key(seed), **static)


def step(
    state: TrainState,
    frozen: Any,
    layout: Callable[[Any], Any],
    sharded: tuple[jax.Array, ...],
    seed: int,
    rows: int,
) -> tuple[TrainState, dict[str, Any]]:
    tokens, lengths, ids, reference, boundaries = sharded
    rollouts = roll(layout(join_adapters(frozen, state.params)), sharded, seed)
    ended = rollouts.lengths_PxG, rollouts.stopped_PxG
    reward, status = prefix_match_reward(
        rollouts.tokens_PxGxT, *ended, reference, boundaries, BYTES_VxX, LENGTHS_V, end_think_id=-1
    )
    counted = jnp.ones_like(lengths, bool)
    batch = UpdateBatch(
        prompts_PxS=tokens,
        lengths_P=lengths,
        window_P=ids // 2,
        tokens_PxGxT=rollouts.tokens_PxGxT,
        mask_PxGxT=rollouts.mask_PxGxT,
        sampler_logprobs_PxGxT=rollouts.logprobs_PxGxT,
        advantages_PxG=group_advantages("grpo", reward, rollouts.lengths_PxG, counted, 1e-6),
        counted_P=counted,
    )
    limits = dataclasses.replace(LIMITS, rows=rows)
    state, metrics = update_policy(POLICY, OPTIMIZER, OBJECTIVE, limits, state, batch, frozen=frozen)
    # These depend on how groups are packed, which depends on the mesh.
    packing = ("update/filled", "update/trunk_tokens", "update/flops")
    metrics = {name: value for name, value in metrics.items() if name not in packing}
    return state, {"rollouts": rollouts._asdict(), "reward": reward, "status": status, "metrics": metrics}


def mesh_from_config(sizes: tuple[int, int, int, int]) -> Mesh:
    *axes, rollout_tensor = sizes
    return make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))], rollout_tensor=rollout_tensor)


def run(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the results of both steps, the shardings of the state and the number of compilations in the second step.

    Adam's first moment after the first step is a tenth of the gradient.
    """
    mesh = mesh_from_config(sizes)
    with use_mesh(mesh, split_rows=sizes == SPLIT_ROWS):
        params = init_parameters(POLICY, mesh, seed=0)
        frozen, trained = split_adapters(params)
        state = TrainState(trained, init_optimizer(OPTIMIZER, trained, mesh))
        start, before = jax.device_get(params), jax.tree.map(lambda x: x.sharding, state)
        sharded = shard_prompts(prompts(), mesh)
        layout = make_reshard_fn(POLICY, mesh, lambda params: params) or (lambda params: params)
        state, first = step(state, frozen, layout, sharded, seed=1, rows=num_batch_shards(mesh))
        moments = jax.device_get(state.optimizer[1][0].mu)
        COMPILED.clear()
        state, second = step(state, frozen, layout, sharded, seed=2, rows=num_batch_shards(mesh))
    moved = jax.tree.map(lambda x, sharding: not x.sharding.is_equivalent_to(sharding, x.ndim), state, before)

    def stored(tree: Any) -> Any:
        return jax.tree.map(lambda x: sum(shard.data.size for shard in x.addressable_shards), tree)

    return {
        "start": start,
        "first": first,
        "moments": moments,
        "second": {"tokens": second["rollouts"]["tokens_PxGxT"], "reward": second["reward"]},
        "params": state.params,
        "moved": moved,
        "stored": {"params": stored(state.params), "mu": stored(state.optimizer[1][0].mu)},
        "prompts_on_one_device": sharded[0].addressable_shards[0].data.shape[0],
        "compiled_again": len(COMPILED),
    }


def run_rollouts(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the rollouts of the first step of `run`."""
    mesh = mesh_from_config(sizes)
    with use_mesh(mesh):
        layout = make_reshard_fn(POLICY, mesh, lambda params: params) or (lambda params: params)
        params = layout(init_parameters(POLICY, mesh, seed=0))
        return {"first": {"rollouts": roll(params, shard_prompts(prompts(), mesh), seed=1)._asdict()}}


def flat(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{prefix}/{jax.tree_util.keystr(p, simple=True, separator='.')}": np.asarray(leaf) for p, leaf in leaves}


def main() -> None:
    assert jax.device_count() == DEVICES
    alone = mesh_from_config((1, 1, 1, 1))
    results = flat({"start": init_parameters(POLICY, alone, seed=1)}, "another seed")
    for mesh in (argument for argument in sys.argv[2:] if not argument.startswith("--")):
        data, fsdp, tensor, rollout_tensor = map(int, mesh.split("x"))
        compute = run if data * fsdp * tensor in (1, DEVICES) else run_rollouts
        results |= flat(compute((data, fsdp, tensor, rollout_tensor)), mesh)
    np.savez(sys.argv[1], **results)


if __name__ == "__main__":
    main()
