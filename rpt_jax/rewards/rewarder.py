"""Rewards of a batch of rollouts: prefix matching for every batch, and the configured training reward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment, ObjectiveConfig
from rpt_jax.distributed.mesh import num_batch_shards
from rpt_jax.distributed.sharding import constrain_batch, shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.accounting import BatchSize
from rpt_jax.infra.out_of_memory import explain_out_of_memory
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.objective.advantage import has_variance
from rpt_jax.objective.packing import fitting_divisor
from rpt_jax.objective.update import TrainState
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.response_format import BOX
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.catalogue import RewardInputs, RewardLayout, token_budget, total_reward
from rpt_jax.rewards.prefix_match import prefix_match_reward
from rpt_jax.rewards.segment_match import segment_match
from rpt_jax.tokenizers.tokenizer import ByteVocab, Tokenizer

if TYPE_CHECKING:
    from rpt_jax.rollout.rollouts import Rollouts


# Compares predictions with references: `prefix_match_reward` or `segment_match`.
Match = Callable[..., tuple[jax.Array, jax.Array]]


class RewardedRollouts(NamedTuple):
    """P prompts, G rollouts of each, and their rewards, all on the devices.

    Attributes:
      prompts: the prompts.
      rollouts: the sampled responses.
      reward_PxG: float32 reward.
      status_PxG: int32, one of `rewards.prefix_match.Status`; of `rewards.verified.AnswerStatus` for questions and the reward
        "verified".
    """

    prompts: PromptBatch
    rollouts: Rollouts
    reward_PxG: jax.Array
    status_PxG: jax.Array

    def size(self) -> BatchSize:
        """Return the number of tokens without padding, fetched from the devices."""
        prompt_tokens, response_tokens = jax.device_get((self.prompts.lengths_P.sum(), self.rollouts.lengths_PxG.sum()))
        return BatchSize(prompt_tokens=int(prompt_tokens), response_tokens=int(response_tokens))

    def all_vary(self) -> bool:
        """Return whether every group has samples with different rewards, fetched from the devices."""
        return bool(jax.device_get(has_variance(self.reward_PxG).all()))


class Rewarder:
    """Computes rewards: Equation 3 for evaluation, and the configured reward for training."""

    def __init__(
        self, experiment: Experiment, policy: Transformer, tokenizer: Tokenizer, mesh: Mesh, builder: PromptBuilder
    ):
        """
        Args:
          experiment: the config.
          policy: the decoder, for rewards that score with it.
          tokenizer: gives the bytes of tokens and the end-of-thinking token.
          mesh: the devices that training uses.
          builder: gives the lengths of the prompt template.

        Raises: UserError, if the tokenizer lacks a token that the reward needs.
        """
        objective = experiment.objective
        self._objective = objective
        self._layout = reward_layout(experiment, tokenizer, mesh, builder)
        self._policy = policy
        self._mesh = mesh
        self._vocab = jax.device_put(tokenizer.byte_vocab)
        self._end_think_id = tokenizer.end_think_id
        self._memory_fields = {
            "training.microbatch_tokens": experiment.training.microbatch_tokens,
            "training.logit_chunk_tokens": experiment.training.logit_chunk_tokens,
        }
        self._box_reading = experiment.prompt.box_reading
        self._budget = functools.partial(
            token_budget,
            total_steps=experiment.training.total_steps,
            start=objective.budget_start,
            decay=objective.budget_decay,
            minimum=objective.budget_min,
        )

    def __call__(self, state: TrainState, prompts: PromptBatch, rollouts: Rollouts, step: int) -> RewardedRollouts:
        """Return the rollouts of training step `step` with the configured reward.

        Args:
          state: the policy to score with, and its moving average if the reward requires one.
          prompts: the prompts, on the host.
          rollouts: the sampled responses.
          step: number of the step, which decides on the token budget.
        """
        return self.complete(state, self.prefix_match(prompts, rollouts), step)

    def complete(self, state: TrainState, matched: RewardedRollouts, step: int) -> RewardedRollouts:
        """Return rollouts with the configured reward, all terms included.

        Args:
          state, step: as of `__call__`.
          matched: the rollouts, with the reward of Equation 3 or, for questions and the reward "verified", that of the verifier.
        """
        if is_prefix_match(self._objective):
            return matched
        budget = jax.device_put(np.int32(self._budget(step)))
        with explain_out_of_memory("the reward", self._memory_fields):
            reward_PxG = jax.block_until_ready(
                training_reward(
                    self._policy,
                    self._objective,
                    self._layout,
                    state.params,
                    state.average,
                    matched,
                    self._vocab,
                    budget,
                )
            )
        return matched._replace(reward_PxG=reward_PxG)

    def prefix_match(self, prompts: PromptBatch, rollouts: Rollouts) -> RewardedRollouts:
        """Return the rollouts with the reward of Equation 3, which evaluation of next tokens always uses."""
        return self._match(prompts, rollouts, prefix_match_reward)

    def segment_match(self, prompts: PromptBatch, rollouts: Rollouts) -> RewardedRollouts:
        """Return the rollouts with the share of the segment's tokens that each prediction begins with, for evaluation."""
        return self._match(prompts, rollouts, segment_match)

    def _match(self, prompts: PromptBatch, rollouts: Rollouts, match: Match) -> RewardedRollouts:
        prompts = shard_prompts(prompts, self._mesh)
        reward_PxG, status_PxG = match_batch(
            prompts, rollouts, self._vocab, self._end_think_id, self._box_reading, match
        )
        return RewardedRollouts(prompts=prompts, rollouts=rollouts, reward_PxG=reward_PxG, status_PxG=status_PxG)


def is_prefix_match(objective: ObjectiveConfig) -> bool:
    """Return whether the training reward is Equation 3 without any additional term."""
    terms = objective.format_weight or objective.overlong_weight or objective.budget_weight
    return objective.reward == "prefix" and not terms


def check_end_of_thinking(objective: ObjectiveConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the training reward needs an end-of-thinking token that the tokenizer lacks."""
    needs_end_of_thinking = REWARDS[objective.reward].requirements.end_of_thinking
    if tokenizer.end_think_id < 0 and (needs_end_of_thinking or objective.budget_weight):
        field = "objective.reward" if needs_end_of_thinking else "objective.budget_weight"
        value = f"'{objective.reward}'" if needs_end_of_thinking else objective.budget_weight
        raise UserError(
            f"{field}={value} needs a tokenizer with a </think> token, but {tokenizer.source} has none.", field=field
        )


def reward_layout(experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh, builder: PromptBuilder) -> RewardLayout:
    """Return the layout that the training reward uses.

    Raises: UserError, if the tokenizer lacks a token that the reward needs.
    """
    check_end_of_thinking(experiment.objective, tokenizer)
    return RewardLayout(
        bos_id=tokenizer.bos_id,
        template_prefix_tokens=len(builder.before),
        template_suffix_tokens=len(builder.after),
        end_think_id=tokenizer.end_think_id,
        box_reading=experiment.prompt.box_reading,
        bridge_ids=(tokenizer.end_think_id, *tokenizer.encode(BOX)),
        max_new_tokens=experiment.rollout.max_new_tokens,
        prompts_per_pass=_prompts_per_pass(experiment, mesh),
        logit_chunk_tokens=experiment.training.logit_chunk_tokens,
    )


def _prompts_per_pass(experiment: Experiment, mesh: Mesh) -> int:
    """Return how many prompts, with their responses, fit in a microbatch of the update."""
    rollout = experiment.rollout
    training = experiment.training
    shards = num_batch_shards(mesh)
    tokens_per_prompt = experiment.prompt.max_tokens + rollout.samples_per_prompt * rollout.max_new_tokens
    return fitting_divisor(
        training.prompts_per_step,
        maximum=shards * training.microbatch_tokens // tokens_per_prompt,
        multiple=shards,
    )


@functools.partial(jax.jit, static_argnames=("end_think_id", "box_reading", "match"))
def match_batch(
    prompts: PromptBatch,
    rollouts: Rollouts,
    vocab: ByteVocab,
    end_think_id: int,
    box_reading: str,
    match: Match = prefix_match_reward,
) -> tuple[jax.Array, jax.Array]:
    """Return the reward (float32) and the status (int32) of `match`, [P, G], sharded like the training batch."""
    return constrain_batch(
        match(
            tokens_PxGxT=rollouts.tokens_PxGxT,
            lengths_PxG=rollouts.lengths_PxG,
            stopped_PxG=rollouts.stopped_PxG,
            reference_PxR=jnp.asarray(prompts.reference_PxR),
            boundaries_PxRp1=jnp.asarray(prompts.boundaries_PxRp1),
            vocab_bytes_VxX=jnp.asarray(vocab.bytes_VxX),
            vocab_lengths_V=jnp.asarray(vocab.lengths_V),
            end_think_id=end_think_id,
            reading=box_reading,
        )
    )


@functools.partial(jax.jit, static_argnames=("policy", "objective", "layout"))
@jax.named_scope("training_reward")
@in_policy_precision
def training_reward(
    policy: Transformer,
    objective: ObjectiveConfig,
    layout: RewardLayout,
    params: Params,
    average: Params | None,
    matched: RewardedRollouts,
    vocab: ByteVocab,
    budget: jax.Array,
) -> jax.Array:
    """Return the configured reward of rollouts that have the reward of Equation 3, float32 [P, G].

    Args:
      policy, objective, layout: static; see `RewardInputs`.
      params: parameters of the current policy.
      average: moving average of the parameters; None unless the reward requires it.
      matched: rollouts with the reward of Equation 3.
      vocab: raw bytes of every token.
      budget: int32 token budget of the reasoning.
    """
    prompts = matched.prompts
    rollouts = matched.rollouts
    inputs = RewardInputs(
        objective=objective,
        layout=layout,
        policy=policy,
        params=params,
        average=average,
        prompts_PxS=jnp.asarray(prompts.tokens_PxS),
        lengths_P=jnp.asarray(prompts.lengths_P),
        tokens_PxGxT=rollouts.tokens_PxGxT,
        response_lengths_PxG=rollouts.lengths_PxG,
        stopped_PxG=rollouts.stopped_PxG,
        reference_PxR=jnp.asarray(prompts.reference_PxR),
        boundaries_PxRp1=jnp.asarray(prompts.boundaries_PxRp1),
        reference_ids_PxR=jnp.asarray(prompts.reference_ids_PxR),
        reference_lengths_P=jnp.asarray(prompts.boundaries_PxRp1).sum(axis=1),
        matched_PxG=matched.reward_PxG,
        status_PxG=matched.status_PxG,
        vocab=vocab,
    )
    return total_reward(inputs, budget)
