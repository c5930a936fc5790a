"""Rollouts with their rewards: what the loop and the evaluation sample alike."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment, ObjectiveConfig
from rpt_jax.distributed.mesh import DECODING, mesh_fields, num_batch_shards
from rpt_jax.distributed.sharding import constrain_batch, make_reshard_fn, shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.accounting import BatchSize, Clock
from rpt_jax.model.transformer import Params, Transformer, in_compute_dtype
from rpt_jax.objective.advantage import group_advantages, has_variance
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch
from rpt_jax.objective.packing import fitting_divisor
from rpt_jax.objective.update import TrainState
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.catalogue import BOX, RewardConfig, RewardInputs, token_budget, total_reward
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from rpt_jax.rollout.generate import Decoding, Ended, Rollouts, Work, replica_count, sample_rollouts
from rpt_jax.rollout.memory import device_memory, plan_slots, rollout_memory
from rpt_jax.rollout.prefix_sharing import Prompts, separate, share_prefixes
from rpt_jax.setup import Setup
from rpt_jax.tokenizers.tokenizer import ByteVocab


class Sampled(NamedTuple):
    """Prompts with their rollouts, rewards [P, G] and statuses [P, G]."""

    prompts: PromptBatch
    rollouts: Rollouts
    reward_PxG: jax.Array
    status_PxG: jax.Array
    decoded: jax.Array  # int32 [2]: tokens decoded, whether kept or not, and how many slots there were for them.

    def size(self) -> BatchSize:
        """Real tokens in the batch, fetched from the device."""
        prompt_tokens, response_tokens = jax.device_get((self.prompts.lengths_P.sum(), self.rollouts.lengths_PxG.sum()))
        return BatchSize(int(prompt_tokens), int(response_tokens))

    def all_vary(self) -> bool:
        """Whether every group has samples that were rewarded differently, fetched from the device."""
        return bool(jax.device_get(has_variance(self.reward_PxG).all()))


class Sampler:
    """Samples and rewards batches of prompts with one compiled program each."""

    def __init__(self, experiment: Experiment, setup: Setup, builder: PromptBuilder):
        self._tail = shared_tail(experiment, builder)
        self._mesh, self._tokenizer, self._policy = setup.mesh, setup.tokenizer, setup.policy
        self._decoding = decoding_of(experiment, setup, device_memory())
        self._vocab = jax.device_put(setup.tokenizer.byte_vocab)
        self._key = jax.random.key(experiment.seed)
        self._box_vocab = tuple(self._vocab) if experiment.rollout.stop_at_box else None
        self._layout = make_reshard_fn(setup.policy, setup.mesh, functools.partial(in_compute_dtype, setup.policy))

    def weights(self, params: Params) -> Params:
        """Lay parameters out for decoding: what `__call__` samples from."""
        return jax.block_until_ready(self._layout(params)) if self._layout else params

    def __call__(self, weights: Params, prompts: PromptBatch, step: int, clock: Clock | None = None) -> Sampled:
        """Roll out each prompt G times with the noise of `step`, and reward what was predicted.

        The time of the rollouts is counted by `clock`; what it counts next is the reward's.
        """
        on_roots = on_their_roots(prompts, self._tail)
        prompts, on_roots = shard_prompts(prompts, self._mesh), shard_prompts(on_roots, self._mesh, DECODING)
        key = jax.random.fold_in(self._key, jax.device_put(np.uint32(step)))
        rollouts, work = sample_rollouts(self._policy, weights, on_roots, key, self._decoding, self._box_vocab)
        if clock:
            jax.block_until_ready(rollouts)
            clock.lap("rollout")
        return Sampled(prompts, rollouts, *_judged(prompts, rollouts, work, self._vocab, self._tokenizer.end_think_id))


def shared_tail(experiment: Experiment, builder: PromptBuilder) -> int:
    """The most tokens that a prompt has of its own, where a step has several positions of a document; else 0.

    Of two positions of a document, one's context begins as the other's; then comes the template's end.
    """
    return max(1, len(builder.after)) if experiment.data.positions_per_document > 1 else 0


def on_their_roots(prompts: PromptBatch, tail: int) -> Prompts:
    """What is run once: each prompt or, with a `tail`, each document."""
    arrays = prompts.tokens_PxS, prompts.lengths_P, prompts.ids_P
    return share_prefixes(*arrays, tail, replica_count()) if tail else separate(*arrays)


def decoding_of(experiment: Experiment, setup: Setup, memory: int) -> Decoding:
    """How the config samples, with as many slots as `memory`, bytes a device, has room for.

    Raises: UserError, where it asks for more.
    """
    config, t, mesh = experiment.rollout, experiment.training, setup.mesh
    replicas, tensor = num_batch_shards(mesh, DECODING), mesh_fields(mesh)["rollout_tensor"]
    laid_out = jax.eval_shape(functools.partial(in_compute_dtype, setup.policy), setup.params)
    prompts, tokens = -(-t.prompts_per_step // replicas), config.max_new_tokens
    rollouts = rollout_memory(
        setup.policy.config,
        experiment.policy.dtype,
        prompts,
        experiment.prompt.max_tokens,
        config.samples_per_prompt,
        tokens,
        tensor,
    )
    # Parameters, those of the start and two moments, and a copy laid out for decoding.
    resident = 4 * 4 * setup.policy.config.parameters // (mesh.size // mesh.shape["data"])
    resident += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(laid_out)) // tensor
    asked = -(-config.decode_slots // replicas)
    slots = plan_slots(asked, prompts * config.samples_per_prompt, rollouts, resident, memory)
    return Decoding(
        samples=config.samples_per_prompt,
        max_new_tokens=tokens,
        temperature=config.temperature,
        stop_ids=setup.tokenizer.stop_ids,
        top_k=config.top_k,
        top_p=config.top_p,
        end_think_id=setup.tokenizer.end_think_id,
        slots=slots * replicas,
        chunk=config.prefill_tokens,
    )


@functools.partial(jax.jit, static_argnames="end_think_id")
def _judged(
    prompts: PromptBatch, rollouts: Rollouts, work: Work, vocab: ByteVocab, end_think_id: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards and statuses [P, G], and `Sampled.decoded`."""
    reward_PxG, status_PxG = prefix_match_reward(
        rollouts.tokens_PxGxT,
        rollouts.lengths_PxG,
        rollouts.stopped_PxG,
        prompts.reference_PxR,
        prompts.boundaries_PxRp1,
        vocab.bytes_VxX,
        vocab.lengths_V,
        end_think_id,
    )
    # The first token of each comes from the prefill.
    decoded = jnp.stack([jnp.maximum(rollouts.lengths_PxG - 1, 0).sum(), work.slots.sum()])
    return *constrain_batch((reward_PxG, status_PxG)), decoded


class Rewarder:
    """Gives rollouts the reward that the config names, in the place of Equation 3's, which they come with."""

    def __init__(self, experiment: Experiment, setup: Setup, builder: PromptBuilder):
        """Raises: UserError, where the tokenizer lacks what the reward needs."""
        o, t = experiment.objective, experiment.training
        self._config, self._is_default = reward_config(experiment, setup, builder), is_prefix_match(o)
        self._policy, self._vocab = setup.policy, jax.device_put(tuple(setup.tokenizer.byte_vocab))
        self._budget = functools.partial(
            token_budget, total=t.total_steps, start=o.budget_start, decay=o.budget_decay, least=o.budget_min
        )

    def __call__(self, state: TrainState, sampled: Sampled, step: int) -> Sampled:
        """Return the rollouts of `step` with their training reward."""
        if self._is_default:
            return sampled
        weights = state.params, state.average
        budget = jax.device_put(np.int32(self._budget(step)))
        reward_PxG = training_reward(self._policy, self._config, weights, sampled, self._vocab, budget)
        return sampled._replace(reward_PxG=reward_PxG)


def is_prefix_match(objective: ObjectiveConfig) -> bool:
    """Whether the training reward is Equation 3's alone, which rollouts come with."""
    o = objective
    return o.reward == "prefix" and not (o.format_weight or o.overlong_weight or o.budget_weight)


def reward_config(experiment: Experiment, setup: Setup, builder: PromptBuilder) -> RewardConfig:
    """The config's part of the training reward. Raises: UserError, where the tokenizer lacks what it needs."""
    o, tokenizer = experiment.objective, setup.tokenizer
    needs_end_of_thinking = REWARDS[o.reward].requirements.end_of_thinking
    if tokenizer.end_think_id < 0 and (needs_end_of_thinking or o.budget_weight):
        wanted = f"objective.reward='{o.reward}'" if needs_end_of_thinking else "objective.budget_weight"
        raise UserError(f"{wanted} needs to know where reasoning ends: a tokenizer with a </think> token.")
    return RewardConfig(
        reward=o.reward,
        reference_tokens=o.reference_tokens,
        format_weight=o.format_weight,
        overlong_weight=o.overlong_weight,
        overlong_tokens=o.overlong_tokens,
        budget_weight=o.budget_weight,
        response_limit=experiment.rollout.max_new_tokens,
        bos_id=tokenizer.bos_id,
        before=len(builder.before),
        after=len(builder.after),
        end_think_id=tokenizer.end_think_id,
        bridge=(tokenizer.end_think_id, *tokenizer.encode(BOX)),
        microbatch=_scored_prompts(experiment, setup.mesh),
        chunk=experiment.training.logit_chunk_tokens,
    )


def _scored_prompts(experiment: Experiment, mesh: Mesh) -> int:
    """How many prompts, with their responses, are asked about at one time: as many as the update has room for."""
    r, t, devices = experiment.rollout, experiment.training, num_batch_shards(mesh)
    tokens = experiment.prompt.max_tokens + r.samples_per_prompt * r.max_new_tokens
    return fitting_divisor(t.prompts_per_step, devices * t.microbatch_tokens // tokens, devices)


@functools.partial(jax.jit, static_argnames=("policy", "config"))
def training_reward(
    policy: Transformer,
    config: RewardConfig,
    weights: tuple[Params, Params | None],
    sampled: Sampled,
    vocab: tuple[jax.Array, jax.Array],
    budget: jax.Array,
) -> jax.Array:
    prompts, rollouts = sampled.prompts, sampled.rollouts
    evidence = RewardInputs(
        config,
        policy,
        *weights,
        prompts_PxS=prompts.tokens_PxS,
        lengths_P=prompts.lengths_P,
        tokens_PxGxT=rollouts.tokens_PxGxT,
        response_lengths_PxG=rollouts.lengths_PxG,
        stopped_PxG=rollouts.stopped_PxG,
        reference_ids_PxR=prompts.reference_ids_PxR,
        references_P=prompts.boundaries_PxRp1.sum(axis=1),
        matched_PxG=sampled.reward_PxG,
        status_PxG=sampled.status_PxG,
        vocab=vocab,
    )
    return total_reward(evidence, budget)


@functools.partial(jax.jit, static_argnames="count")
def first_prompts(sampled: Sampled, count: int) -> Sampled:
    """The first `count` prompts with their rollouts: all that is fetched from the devices where a few are shown."""
    return jax.tree.map(lambda x: x[:count], sampled)


@jax.jit
def prefer_variance(kept: Sampled, fresh: Sampled) -> Sampled:
    """Of two batches of P groups return one: those with variance first, older ones before newer ones."""
    kept_fresh = (sampled._replace(decoded=None) for sampled in (kept, fresh))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *kept_fresh)
    order = jnp.argsort(~has_variance(both.reward_PxG), stable=True)[: kept.reward_PxG.shape[0]]
    chosen = constrain_batch(jax.tree.map(lambda x: x[order], both))
    return chosen._replace(decoded=kept.decoded + fresh.decoded)


def distinct_share(tokens_PxGxT: jax.Array, lengths_PxG: jax.Array, n: int) -> jax.Array:
    """Distinct-n: different runs of n tokens among the samples of a prompt, over all runs of n, in the mean (1510.03055).

    Runs are told apart by a hash of 32 bits. Prompts whose samples are all shorter than n are left out.
    """
    starts = tokens_PxGxT.shape[2] - n + 1
    if starts < 1:
        return jnp.float32(1.0)
    hashed = jnp.zeros((*tokens_PxGxT.shape[:2], starts), jnp.uint32)
    for i in range(n):
        hashed = (hashed ^ tokens_PxGxT[..., i : i + starts].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hashed ^= hashed >> 15
    real = jnp.arange(starts) <= lengths_PxG[..., None] - n
    last = jnp.uint32(2**32 - 1)
    sorted_PxM = jnp.sort(jnp.where(real, jnp.minimum(hashed, last - 1), last).reshape(len(tokens_PxGxT), -1), axis=1)
    new_PxM = jnp.diff(sorted_PxM, axis=1, prepend=last) != 0
    total_P = real.sum(axis=(1, 2))
    share_P = (new_PxM & (sorted_PxM != last)).sum(axis=1) / jnp.maximum(total_P, 1)
    return jnp.sum(jnp.where(total_P > 0, share_P, 0.0)) / jnp.maximum((total_P > 0).sum(), 1)


@jax.jit
def rollout_metrics(sampled: Sampled) -> dict[str, jax.Array]:
    """Scalars that describe a batch of rollouts, under the names that metrics.jsonl uses."""
    lengths, status, mask = sampled.rollouts.lengths_PxG, sampled.status_PxG, sampled.rollouts.mask_PxGxT
    metrics = {f"status/{s.name.lower()}": (status == s).mean() for s in Status}
    metrics |= {f"ended/{e.name.lower()}": (sampled.rollouts.ended_PxG == e).mean() for e in Ended}
    metrics |= {f"distinct/{n}": distinct_share(sampled.rollouts.tokens_PxGxT, lengths, n) for n in (1, 2, 3)}
    return metrics | {
        "reward/mean": sampled.reward_PxG.mean(),
        "format/rate": 1.0 - jnp.isin(status, jnp.array([Status.NO_BOX, Status.NOT_FINISHED])).mean(),
        "groups/zero_variance": 1.0 - has_variance(sampled.reward_PxG).mean(),
        "length/mean": lengths.mean(),
        "length/p90": jnp.percentile(lengths, 90),
        "length/max": lengths.max(),
        "rollout/occupancy": sampled.decoded[0] / jnp.maximum(sampled.decoded[1], 1),
        # The mean surprise of sampled tokens estimates the policy's entropy (nats a token, at the sampling temperature).
        "policy/entropy": -jnp.sum(sampled.rollouts.logprobs_PxGxT) / jnp.maximum(mask.sum(), 1),
    }


@functools.partial(jax.jit, static_argnames=("config", "only_informative"))
def to_update_batch(
    sampled: Sampled, config: ObjectiveConfig, only_informative: bool, documents: NextTokenBatch | None = None
) -> UpdateBatch:
    """Pair the rollouts with their group-relative advantages."""
    varied_P = has_variance(sampled.reward_PxG)
    counted_P = varied_P if only_informative else jnp.ones_like(varied_P)
    lengths_PxG, epsilon = sampled.rollouts.lengths_PxG, config.advantage_epsilon
    batch = UpdateBatch(
        prompts_PxS=sampled.prompts.tokens_PxS,
        lengths_P=sampled.prompts.lengths_P,
        window_P=sampled.prompts.window_P,
        tokens_PxGxT=sampled.rollouts.tokens_PxGxT,
        mask_PxGxT=sampled.rollouts.mask_PxGxT,
        sampler_logprobs_PxGxT=sampled.rollouts.logprobs_PxGxT,
        advantages_PxG=group_advantages(config.advantage, sampled.reward_PxG, lengths_PxG, counted_P, epsilon),
        counted_P=counted_P,
        documents=documents,
    )
    return constrain_batch(batch)
