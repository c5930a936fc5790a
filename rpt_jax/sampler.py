"""Rollouts with their rewards: what the loop and the evaluation sample alike."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.config import Experiment
from rpt_jax.data.prompts import PromptBatch
from rpt_jax.infra.accounting import BatchSize
from rpt_jax.infra.sharding import decoding_layout, shard_prompts
from rpt_jax.objective.advantage import grpo_advantage, has_variance
from rpt_jax.objective.reward import Status, prefix_match_reward
from rpt_jax.objective.update import UpdateBatch
from rpt_jax.policy.transformer import Params
from rpt_jax.rollout.generate import Rollouts, generate
from rpt_jax.setup import Setup


class Sampled(NamedTuple):
    """Prompts with their rollouts, rewards [P, G] and statuses [P, G]."""

    prompts: PromptBatch
    rollouts: Rollouts
    reward_PxG: jax.Array
    status_PxG: jax.Array

    def size(self) -> BatchSize:
        """Real tokens in the batch, fetched from the device."""
        return BatchSize(int(self.prompts.lengths_P.sum()), int(self.rollouts.lengths_PxG.sum()))


class Sampler:
    """Samples and rewards batches of prompts with one compiled program each."""

    def __init__(self, experiment: Experiment, setup: Setup):
        self._mesh, self._tokenizer, self._policy = setup.mesh, setup.tokenizer, setup.policy
        self._config = experiment.rollout
        self._vocab = jax.device_put(setup.tokenizer.byte_vocab)
        self._key = jax.random.key(experiment.seed)
        self._layout = decoding_layout(setup.policy, setup.mesh)

    def __call__(self, params: Params, prompts: PromptBatch, step: int) -> Sampled:
        """Roll out each prompt G times with the noise of `step`, and reward what was predicted."""
        prompts = shard_prompts(prompts, self._mesh)
        rollouts = generate(
            self._policy,
            self._layout(params),
            prompts.tokens_PxS,
            prompts.lengths_P,
            prompts.ids_P,
            jax.random.fold_in(self._key, step),
            samples=self._config.samples_per_prompt,
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            stop_ids=self._tokenizer.stop_ids,
        )
        reward, status = prefix_match_reward(
            rollouts.tokens_PxGxT,
            rollouts.lengths_PxG,
            rollouts.stopped_PxG,
            prompts.reference_PxR,
            prompts.boundaries_PxRp1,
            self._vocab.bytes_VxX,
            self._vocab.lengths_V,
            self._tokenizer.end_think_id,
        )
        return Sampled(prompts, rollouts, reward, status)


@jax.jit
def prefer_variance(kept: Sampled, fresh: Sampled) -> Sampled:
    """Of two batches of P groups return one: those with variance first, older ones before newer ones."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, fresh)
    order = jnp.argsort(~has_variance(both.reward_PxG), stable=True)[: kept.reward_PxG.shape[0]]
    return jax.tree.map(lambda x: x[order], both)


@jax.jit
def rollout_metrics(sampled: Sampled) -> dict[str, jax.Array]:
    """Scalars that describe a batch of rollouts, under the names that metrics.jsonl uses."""
    lengths, status, mask = sampled.rollouts.lengths_PxG, sampled.status_PxG, sampled.rollouts.mask_PxGxT
    metrics = {f"status/{s.name.lower()}": (status == s).mean() for s in Status}
    return metrics | {
        "reward/mean": sampled.reward_PxG.mean(),
        "format/rate": 1.0 - jnp.isin(status, jnp.array([Status.NO_BOX, Status.NOT_FINISHED])).mean(),
        "groups/zero_variance": 1.0 - has_variance(sampled.reward_PxG).mean(),
        "length/mean": lengths.mean(),
        "length/p90": jnp.percentile(lengths, 90),
        "length/max": lengths.max(),
        "length/truncated": 1.0 - sampled.rollouts.stopped_PxG.mean(),
        # The mean surprise of sampled tokens estimates the policy's entropy (nats a token, at the sampling temperature).
        "policy/entropy": -jnp.sum(sampled.rollouts.logprobs_PxGxT) / jnp.maximum(mask.sum(), 1),
    }


def to_update_batch(sampled: Sampled, epsilon: float, only_informative: bool) -> UpdateBatch:
    """Pair the rollouts with their group-relative advantages."""
    varied_P = has_variance(sampled.reward_PxG)
    return UpdateBatch(
        prompts_PxS=sampled.prompts.tokens_PxS,
        lengths_P=sampled.prompts.lengths_P,
        tokens_PxGxT=sampled.rollouts.tokens_PxGxT,
        mask_PxGxT=sampled.rollouts.mask_PxGxT,
        sampler_logprobs_PxGxT=sampled.rollouts.logprobs_PxGxT,
        advantages_PxG=grpo_advantage(sampled.reward_PxG, epsilon),
        counted_P=varied_P if only_informative else jnp.ones_like(varied_P),
    )
