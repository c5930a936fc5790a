"""What a response earns, by name: the paper's Equation 3, what its Appendix A and others put in its place, added terms.

A reward is a function of `RewardInputs`, which computes what takes a forward pass where it is asked for. Probabilities are the
policy's own, at temperature 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.transformer import Params, Transformer, branch_hidden, head
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.prefix_match import Status, predicted_first_token

BOX = "\\boxed{"  # Between the reasoning and a prediction.


class RewardConfig(NamedTuple):
    """`microbatch` (prompts) and `chunk` (tokens of logits) bound memory and do not change the result.

    The reward's name and what belongs to it are those of `config.ObjectiveConfig`. `bos_id` begins a document, `before` and
    `after` count the template's tokens around a context, and `bridge` is what leads from reasoning to a prediction: the
    end-of-thinking token, and those of BOX.
    """

    reward: str
    reference_tokens: int
    format_weight: float
    overlong_weight: float
    overlong_tokens: int
    budget_weight: float
    response_limit: int
    bos_id: int
    before: int
    after: int
    end_think_id: int
    bridge: tuple[int, ...]
    microbatch: int
    chunk: int


class RewardInputs(NamedTuple):
    """P prompts with G responses each, what is known of them, and the policies that may be asked.

    Attributes:
      average: moving average of the parameters, for "info_gain" alone.
      prompts_PxS, lengths_P: int32.
      tokens_PxGxT, response_lengths_PxG, stopped_PxG: the responses.
      reference_ids_PxR, references_P: tokens of the true continuation, and how many are known.
      matched_PxG, status_PxG: Equation 3's reward, and why.
      vocab: raw bytes of every token, and their numbers.
    """

    config: RewardConfig
    policy: Transformer
    params: Params
    average: Params | None
    prompts_PxS: jax.Array
    lengths_P: jax.Array
    tokens_PxGxT: jax.Array
    response_lengths_PxG: jax.Array
    stopped_PxG: jax.Array
    reference_ids_PxR: jax.Array
    references_P: jax.Array
    matched_PxG: jax.Array
    status_PxG: jax.Array
    vocab: tuple[jax.Array, jax.Array]

    @property
    def reference_PxK(self) -> jax.Array:
        """The true continuation's first tokens, as many as the reward scores,"""
        return self.reference_ids_PxR[:, : self.config.reference_tokens]

    @property
    def real_PxK(self) -> jax.Array:
        """and which of them there are."""
        return jnp.arange(self.reference_PxK.shape[1]) < self.references_P[:, None]

    def first_tokens(self) -> tuple[jax.Array, jax.Array]:
        """The first token of every prediction, -1 where there is none, and whether it is the true one, [P, G] each."""
        responses = self.tokens_PxGxT, self.response_lengths_PxG, self.stopped_PxG
        first_PxG = predicted_first_token(*responses, *self.vocab, self.config.end_think_id)
        return first_PxG, (first_PxG == self.reference_PxK[:, :1]) & self.real_PxK[:, :1]

    def reasoning_lengths(self) -> jax.Array:
        """Tokens before the last end-of-thinking token; where there is none, all but the stop token. int32 [P, G]."""
        places_T = jnp.arange(self.tokens_PxGxT.shape[-1], dtype=jnp.int32)
        live_PxGxT = places_T < self.response_lengths_PxG[..., None]
        last_PxG = jnp.max(
            jnp.where(live_PxGxT & (self.tokens_PxGxT == self.config.end_think_id), places_T, -1), axis=-1
        )
        return jnp.where(last_PxG >= 0, last_PxG, self.response_lengths_PxG - self.stopped_PxG)

    def after_reasoning(self) -> jax.Array:
        """log p(x_k | prompt, reasoning, bridge, x_<k) under the present policy, float32 [P, G, K].

        What a response predicts is left out. Reasoning that never ends is ended where it stands.
        """
        c, tokens_PxGxT, end_PxG = self.config, self.tokens_PxGxT, self.reasoning_lengths()
        rows, added = tokens_PxGxT.shape[:2], (*c.bridge,)
        reference_PxGxK = jnp.broadcast_to(self.reference_PxK[:, None], (*rows, self.reference_PxK.shape[1]))
        bridge_PxGxB = jnp.broadcast_to(jnp.array(added, jnp.int32), (*rows, len(added)))
        suffix_PxGxM = jnp.concatenate([bridge_PxGxB, reference_PxGxK], axis=-1)
        places = jnp.arange(tokens_PxGxT.shape[-1] + suffix_PxGxM.shape[-1]) - end_PxG[..., None]
        suffix = jnp.take_along_axis(suffix_PxGxM, jnp.clip(places, 0, suffix_PxGxM.shape[-1] - 1), axis=-1)
        widened = jnp.pad(tokens_PxGxT, ((0, 0), (0, 0), (0, suffix_PxGxM.shape[-1])))
        scored = jnp.where(places < 0, widened, suffix)
        return self._score(self.params, self.prompts_PxS, self.lengths_P, scored, end_PxG + len(added), reference_PxGxK)

    def without_reasoning(self, params: Params, tokens_PxGxK: jax.Array) -> jax.Array:
        """log p(tokens_k | x_<t, tokens_<k), float32 [P, G, K]: the document itself is the context, without a template."""
        c = self.config
        bos_Px1 = jnp.full((self.prompts_PxS.shape[0], 1), c.bos_id, jnp.int32)
        context_PxS = jnp.concatenate([bos_Px1, self.prompts_PxS[:, c.before :]], axis=1)
        lengths_P = self.lengths_P - c.before - c.after + 1
        # The trunk runs over all but the last token, and over nothing at all it does not run.
        widened = jnp.pad(tokens_PxGxK, ((0, 0), (0, 0), (0, 1)))
        begin_PxG = jnp.zeros(tokens_PxGxK.shape[:2], jnp.int32)
        return self._score(params, context_PxS, lengths_P, widened, begin_PxG, tokens_PxGxK)

    def _score(self, params: Params, *arrays: jax.Array) -> jax.Array:
        """Log-probabilities of `targets`, which stand in `branches` from `begin` on, a microbatch of prompts at a time."""

        def score(arrays: tuple[jax.Array, ...]) -> jax.Array:
            prompts_PxS, lengths_P, branches_PxGxE, begin_PxG, targets_PxGxK = arrays
            hidden = branch_hidden(self.policy, params, prompts_PxS, lengths_P, branches_PxGxE)
            places_PxGxK = begin_PxG[..., None] + jnp.arange(targets_PxGxK.shape[-1])
            hidden_MxD = jnp.take_along_axis(hidden, places_PxGxK[..., None], axis=2).reshape(-1, hidden.shape[-1])
            logprobs_M = token_logprobs(
                head(self.policy, params), hidden_MxD, targets_PxGxK.reshape(-1), 1.0, self.config.chunk
            )
            return logprobs_M.reshape(targets_PxGxK.shape)

        size = arrays[0].shape[0]
        split = jax.tree.map(lambda x: x.reshape(-1, min(self.config.microbatch, size), *x.shape[1:]), arrays)
        logprobs = jax.lax.map(score, split)
        return logprobs.reshape(size, *logprobs.shape[2:])


# --- The rewards. Each takes `RewardInputs` and returns float32 [P, G].


@REWARDS.register("prefix")
def prefix_reward(evidence: RewardInputs) -> jax.Array:
    """1 where the prediction is a whole-token prefix of the true continuation (paper, Equation 3), else 0."""
    return evidence.matched_PxG


@REWARDS.register("first_token")
def first_token_reward(evidence: RewardInputs) -> jax.Array:
    """1 where y[0] = x_t, the prediction's first token is the true one, whatever follows it (paper, Appendix A)."""
    return evidence.first_tokens()[1].astype(jnp.float32)


@REWARDS.register("dense", prompt_passes=2)
def dense_reward(evidence: RewardInputs) -> jax.Array:
    """1 where y[0] = x_t, else P(y[0] | x_<t), the policy's probability of it without reasoning (paper, Appendix A).

    0 where there is no prediction. The paper does not say which policy scores; here it is the present one.
    """
    first_PxG, right_PxG = evidence.first_tokens()
    logprobs = evidence.without_reasoning(evidence.params, jnp.maximum(first_PxG, 0)[..., None])[..., 0]
    return jnp.where(right_PxG, 1.0, jnp.where(first_PxG >= 0, jnp.exp(logprobs), 0.0))


@REWARDS.register("conditional_dense", prompt_passes=2)
def conditional_dense_reward(evidence: RewardInputs) -> jax.Array:
    """The dense reward in groups with at least one right prediction, 0 in the others (paper, Appendix A)."""
    return jnp.where(evidence.first_tokens()[1].any(axis=1, keepdims=True), dense_reward(evidence), 0.0)


@REWARDS.register(
    "info_gain",
    prompt_passes=3,
    response_passes=2,
    end_of_thinking=True,
    average=True,
    fields=("reference_tokens", "baseline_decay"),
)
def information_gain_reward(evidence: RewardInputs) -> jax.Array:
    """log p(x_t | x_<t, reasoning) - log p_average(x_t | x_<t), summed over the reference (RLP, 2510.01265).

    The second is a moving average of the policy, which does not reason.
    """
    reference_Px1xK = evidence.reference_PxK[:, None]
    baseline = evidence.without_reasoning(evidence.average, reference_Px1xK)
    return jnp.sum(jnp.where(evidence.real_PxK[:, None], evidence.after_reasoning() - baseline, 0.0), axis=-1)


@REWARDS.register("mean_prob", prompt_passes=2, response_passes=2, end_of_thinking=True, fields=("reference_tokens",))
def mean_probability_reward(evidence: RewardInputs) -> jax.Array:
    """Mean over the reference's tokens of p(x_k | x_<t, reasoning, x_<k) (RLPR, 2506.18254; VeriFree, 2505.21493)."""
    real = evidence.real_PxK[:, None]
    total = jnp.sum(jnp.where(real, jnp.exp(evidence.after_reasoning()), 0.0), axis=-1)
    return total / jnp.maximum(real.sum(axis=-1), 1)


@REWARDS.register("log_prob", prompt_passes=2, response_passes=2, end_of_thinking=True, fields=("reference_tokens",))
def log_probability_reward(evidence: RewardInputs) -> jax.Array:
    """log p(reference | x_<t, reasoning), which does not vanish as the reference grows (2602.03979)."""
    return jnp.sum(jnp.where(evidence.real_PxK[:, None], evidence.after_reasoning(), 0.0), axis=-1)


# --- Added terms.


def format_term(status_PxG: jax.Array) -> jax.Array:
    """1 for a finished response with a box after its reasoning, else 0."""
    return 1.0 - jnp.isin(status_PxG, jnp.array([Status.NO_BOX, Status.NOT_FINISHED]))


def overlong_term(lengths_PxG: jax.Array, limit: int, tokens: int) -> jax.Array:
    """Soft overlong punishment: 0 up to `limit - tokens`, then linearly down to -1 at `limit` (DAPO, 2503.14476)."""
    return -jnp.clip((lengths_PxG - (limit - tokens)) / tokens, 0.0, 1.0)


def budget_term(lengths_PxG: jax.Array, budget: jax.Array) -> jax.Array:
    """A triangle over the length of the reasoning: 1 at the budget, 0 at nothing and at twice the budget (2509.24375)."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(lengths_PxG - budget) / budget)


def token_budget(step: int, total: int, start: int, decay: float, least: int) -> int:
    """B_t = max(B_min, floor(B_0 · γ^(t / T))) (2509.24375)."""
    return max(least, int(start * decay ** (step / total)))


def total_reward(evidence: RewardInputs, budget: jax.Array) -> jax.Array:
    """The reward of the config with its added terms: (1 - w) reward + w budget term + the weighted others."""
    c, reward_PxG = evidence.config, REWARDS[evidence.config.reward].function(evidence)
    if c.budget_weight:
        within = budget_term(evidence.reasoning_lengths(), budget)
        reward_PxG = (1.0 - c.budget_weight) * reward_PxG + c.budget_weight * within
    if c.format_weight:
        reward_PxG = reward_PxG + c.format_weight * format_term(evidence.status_PxG)
    if c.overlong_weight:
        overlong = overlong_term(evidence.response_lengths_PxG, c.response_limit, c.overlong_tokens)
        reward_PxG = reward_PxG + c.overlong_weight * overlong
    return reward_PxG
