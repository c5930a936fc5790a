"""Training rewards by name: Equation 3 and Appendix A of the paper, rewards of other papers, and additional terms.

A reward is a function of `RewardInputs`, whose methods run the forward passes that a reward needs. Probabilities are
those of the policy at temperature 1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rpt_jax.config import ObjectiveConfig
from rpt_jax.model.transformer import Params, Transformer, branch_hidden, head
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.boxed import predicted_first_token
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.segment_match import segment_match
from rpt_jax.tokenizers.tokenizer import ByteVocab


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardLayout:
    """What rewards must know beyond the objective's config: special tokens, template lengths and sizes. Hashable.

    Attributes:
      bos_id: token at the start of a document.
      template_prefix_tokens: number of template tokens before the context in a prompt.
      template_suffix_tokens: number of template tokens after the context in a prompt.
      end_think_id: id of the end-of-thinking token, or -1.
      box_reading: how the prediction is read from its box (`prompt.box_reading`).
      bridge_ids: tokens between reasoning and prediction: the end-of-thinking token and the opening of the box.
      max_new_tokens: length limit of responses.
      prompts_per_pass: prompts that a forward pass scores at once. Bounds memory, does not change the result.
      logit_chunk_tokens: tokens whose logits exist at once. Bounds memory, does not change the result.
    """

    bos_id: int
    template_prefix_tokens: int
    template_suffix_tokens: int
    end_think_id: int
    box_reading: str
    bridge_ids: tuple[int, ...]
    max_new_tokens: int
    prompts_per_pass: int
    logit_chunk_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """P prompts with G responses each, and the policies that can score them. Created and used inside one program.

    Attributes:
      objective: section "objective" of the config.
      layout: special tokens, template lengths and sizes.
      policy: the decoder.
      params: parameters of the current policy.
      average: moving average of the parameters; None unless the reward requires it.
      prompts_PxS: int32 prompt ids, padded on the right.
      lengths_P: int32 prompt lengths.
      tokens_PxGxT: int32 response ids.
      response_lengths_PxG: int32 response lengths.
      stopped_PxG: bool, False for a response that was cut by the length limit.
      reference_PxR: uint8 bytes of the true continuation, which ends with the target if that is a segment.
      boundaries_PxRp1: bool, True at the cumulative token ends of the continuation.
      reference_ids_PxR: int32 tokens of the true continuation.
      reference_lengths_P: int32 number of those tokens.
      matched_PxG: float32 reward of Equation 3 or, for questions and the reward "verified", that of the verifier.
      status_PxG: int32 `Status` under Equation 3, or `rewards.verified.AnswerStatus`.
      vocab: raw bytes of every token.
    """

    objective: ObjectiveConfig
    layout: RewardLayout
    policy: Transformer
    params: Params
    average: Params | None
    prompts_PxS: jax.Array
    lengths_P: jax.Array
    tokens_PxGxT: jax.Array
    response_lengths_PxG: jax.Array
    stopped_PxG: jax.Array
    reference_PxR: jax.Array
    boundaries_PxRp1: jax.Array
    reference_ids_PxR: jax.Array
    reference_lengths_P: jax.Array
    matched_PxG: jax.Array
    status_PxG: jax.Array
    vocab: ByteVocab

    @property
    def reference_PxK(self) -> jax.Array:
        """The first K = `reference_tokens` tokens of the true continuation, int32."""
        return self.reference_ids_PxR[:, : self.objective.reference_tokens]

    @property
    def reference_mask_PxK(self) -> jax.Array:
        """True for the tokens of `reference_PxK` that are not padding."""
        return jnp.arange(self.reference_PxK.shape[1]) < self.reference_lengths_P[:, None]

    def first_tokens(self) -> tuple[jax.Array, jax.Array]:
        """Return the first token of every prediction, or -1, and whether it is the true one, [P, G] each."""
        first_PxG = predicted_first_token(
            self.tokens_PxGxT,
            self.response_lengths_PxG,
            self.stopped_PxG,
            self.vocab.bytes_VxX,
            self.vocab.lengths_V,
            self.layout.end_think_id,
            reading=self.layout.box_reading,
        )
        return first_PxG, (first_PxG == self.reference_PxK[:, :1]) & self.reference_mask_PxK[:, :1]

    def common_prefix_share(self) -> jax.Array:
        """Return the share of the target's tokens that each prediction begins with, float32 [P, G]."""
        share_PxG, _ = segment_match(
            self.tokens_PxGxT,
            self.response_lengths_PxG,
            self.stopped_PxG,
            self.reference_PxR,
            self.boundaries_PxRp1,
            self.vocab.bytes_VxX,
            self.vocab.lengths_V,
            self.layout.end_think_id,
            reading=self.layout.box_reading,
        )
        return share_PxG

    def reasoning_lengths(self) -> jax.Array:
        """Return the number of tokens before the last end-of-thinking token, int32 [P, G].

        For a response without one, this is its length without the stop token.
        """
        index_T = jnp.arange(self.tokens_PxGxT.shape[-1], dtype=jnp.int32)
        live_PxGxT = index_T < self.response_lengths_PxG[..., None]
        is_end_PxGxT = live_PxGxT & (self.tokens_PxGxT == self.layout.end_think_id)
        last_PxG = jnp.max(jnp.where(is_end_PxGxT, index_T, -1), axis=-1)
        return jnp.where(last_PxG >= 0, last_PxG, self.response_lengths_PxG - self.stopped_PxG)

    def reference_logprobs(self) -> jax.Array:
        """Return log p(x_k | prompt, reasoning, bridge, x_<k) under the current policy, float32 [P, G, K].

        The prediction of the response is dropped. Reasoning without an end-of-thinking token is ended by the bridge.
        """
        reasoning_lengths_PxG = self.reasoning_lengths()
        rows = self.tokens_PxGxT.shape[:2]
        bridge_ids = self.layout.bridge_ids

        # The suffix, bridge and reference, overwrites the response from the end of its reasoning on.
        reference_PxGxK = jnp.broadcast_to(self.reference_PxK[:, None], (*rows, self.reference_PxK.shape[1]))
        bridge_PxGxB = jnp.broadcast_to(jnp.array(bridge_ids, jnp.int32), (*rows, len(bridge_ids)))
        suffix_PxGxM = jnp.concatenate([bridge_PxGxB, reference_PxGxK], axis=-1)
        suffix_size = suffix_PxGxM.shape[-1]
        index_PxGxE = jnp.arange(self.tokens_PxGxT.shape[-1] + suffix_size) - reasoning_lengths_PxG[..., None]
        suffix_PxGxE = jnp.take_along_axis(suffix_PxGxM, jnp.clip(index_PxGxE, 0, suffix_size - 1), axis=-1)
        padded_PxGxE = jnp.pad(self.tokens_PxGxT, ((0, 0), (0, 0), (0, suffix_size)))
        return self._branch_logprobs(
            self.params,
            prompts_PxS=self.prompts_PxS,
            lengths_P=self.lengths_P,
            branches_PxGxE=jnp.where(index_PxGxE < 0, padded_PxGxE, suffix_PxGxE),
            begin_PxG=reasoning_lengths_PxG + len(bridge_ids),
            targets_PxGxK=reference_PxGxK,
        )

    def direct_logprobs(self, params: Params, tokens_PxGxK: jax.Array) -> jax.Array:
        """Return log p(tokens_k | x_<t, tokens_<k) without reasoning, float32 [P, G, K].

        The context is the document itself, without the template.

        Args:
          params: parameters of the policy that scores.
          tokens_PxGxK: int32 continuations to score.
        """
        layout = self.layout
        bos_Px1 = jnp.full((self.prompts_PxS.shape[0], 1), layout.bos_id, jnp.int32)
        context_PxS = jnp.concatenate([bos_Px1, self.prompts_PxS[:, layout.template_prefix_tokens :]], axis=1)
        lengths_P = self.lengths_P - layout.template_prefix_tokens - layout.template_suffix_tokens + 1
        return self._branch_logprobs(
            params,
            prompts_PxS=context_PxS,
            lengths_P=lengths_P,
            # One more token, because a branch is run without its last token and must not be empty.
            branches_PxGxE=jnp.pad(tokens_PxGxK, ((0, 0), (0, 0), (0, 1))),
            begin_PxG=jnp.zeros(tokens_PxGxK.shape[:2], jnp.int32),
            targets_PxGxK=tokens_PxGxK,
        )

    @jax.named_scope("branch_logprobs")
    def _branch_logprobs(self, params: Params, **arrays: jax.Array) -> jax.Array:
        """Return the log-probability of every target, float32 [P, G, K], pass by pass.

        Args:
          params: parameters of the policy that scores.
          arrays: `prompts_PxS` and `lengths_P`, the prompts; `branches_PxGxE`, int32 ids that continue them; `begin_PxG`,
            int32 index of the first target in its branch; `targets_PxGxK`, int32 ids to score.
        """

        def score(arrays: dict[str, jax.Array]) -> jax.Array:
            hidden = branch_hidden(
                self.policy, params, arrays["prompts_PxS"], arrays["lengths_P"], arrays["branches_PxGxE"]
            )
            targets_PxGxK = arrays["targets_PxGxK"]
            index_PxGxK = arrays["begin_PxG"][..., None] + jnp.arange(targets_PxGxK.shape[-1])
            hidden_MxD = jnp.take_along_axis(hidden, index_PxGxK[..., None], axis=2).reshape(-1, hidden.shape[-1])
            logprobs_M = token_logprobs(
                head(self.policy, params),
                hidden_MxD,
                targets_PxGxK.reshape(-1),
                temperature=1.0,
                logit_chunk_tokens=self.layout.logit_chunk_tokens,
            )
            return logprobs_M.reshape(targets_PxGxK.shape)

        prompts = len(arrays["lengths_P"])
        size = min(self.layout.prompts_per_pass, prompts)
        passes = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
        logprobs = jax.lax.map(score, passes)
        return logprobs.reshape(prompts, *logprobs.shape[2:])


def total_reward(inputs: RewardInputs, budget: jax.Array) -> jax.Array:
    """Return the configured reward with its additional terms, float32 [P, G].

    The budget term is mixed in as (1 - w) · reward + w · term. The other terms are added with their weights.

    Args:
      inputs: prompts, responses and policies.
      budget: int32 token budget of the reasoning in this step.
    """
    objective = inputs.objective
    reward_PxG = REWARDS[objective.reward].function(inputs)
    if objective.budget_weight:
        term_PxG = budget_term(inputs.reasoning_lengths(), budget)
        reward_PxG = (1.0 - objective.budget_weight) * reward_PxG + objective.budget_weight * term_PxG
    if objective.format_weight:
        reward_PxG = reward_PxG + objective.format_weight * format_term(inputs.status_PxG)
    if objective.overlong_weight:
        term_PxG = overlong_term(
            inputs.response_lengths_PxG, inputs.layout.max_new_tokens, overlong_tokens=objective.overlong_tokens
        )
        reward_PxG = reward_PxG + objective.overlong_weight * term_PxG
    return reward_PxG


# --- Rewards. Each maps `RewardInputs` to float32 [P, G].


@REWARDS.register("prefix")
def prefix_reward(inputs: RewardInputs) -> jax.Array:
    """1 if the prediction is a whole-token prefix of the true continuation, else 0 (paper, Equation 3)."""
    return inputs.matched_PxG


@REWARDS.register("first_token", targets=("token",))
def first_token_reward(inputs: RewardInputs) -> jax.Array:
    """1 if y[0] = x_t: the first predicted token is the true one; the rest is ignored (paper, Appendix A)."""
    _, right_PxG = inputs.first_tokens()
    return right_PxG.astype(jnp.float32)


@REWARDS.register("dense", prompt_passes=2, targets=("token",))
def dense_reward(inputs: RewardInputs) -> jax.Array:
    """1 if y[0] = x_t, else P(y[0] | x_<t), the policy's probability of y[0] without reasoning (paper, Appendix A).

    0 without a prediction. The paper does not say which policy scores; here it is the current one.
    """
    first_PxG, right_PxG = inputs.first_tokens()
    logprobs = inputs.direct_logprobs(inputs.params, jnp.maximum(first_PxG, 0)[..., None])[..., 0]
    return jnp.where(right_PxG, 1.0, jnp.where(first_PxG >= 0, jnp.exp(logprobs), 0.0))


@REWARDS.register("conditional_dense", prompt_passes=2, targets=("token",))
def conditional_dense_reward(inputs: RewardInputs) -> jax.Array:
    """The dense reward in groups with at least one correct prediction, 0 in the others (paper, Appendix A)."""
    _, right_PxG = inputs.first_tokens()
    return jnp.where(right_PxG.any(axis=1, keepdims=True), dense_reward(inputs), 0.0)


@REWARDS.register(
    "info_gain",
    prompt_passes=3,
    response_passes=2,
    end_of_thinking=True,
    average=True,
    targets=("token",),
    fields=("reference_tokens", "baseline_decay"),
)
def information_gain_reward(inputs: RewardInputs) -> jax.Array:
    """log p(x_t | x_<t, reasoning) - log p_average(x_t | x_<t), summed over the reference (RLP, 2510.01265).

    The baseline p_average is a moving average of the policy that predicts without reasoning.
    """
    assert inputs.average is not None
    baseline = inputs.direct_logprobs(inputs.average, inputs.reference_PxK[:, None])
    gain = inputs.reference_logprobs() - baseline
    return jnp.sum(jnp.where(inputs.reference_mask_PxK[:, None], gain, 0.0), axis=-1)


@REWARDS.register("mean_prob", prompt_passes=2, response_passes=2, end_of_thinking=True, fields=("reference_tokens",))
def mean_probability_reward(inputs: RewardInputs) -> jax.Array:
    """Mean over the reference tokens of p(x_k | x_<t, reasoning, x_<k) (RLPR, 2506.18254; VeriFree, 2505.21493)."""
    mask = inputs.reference_mask_PxK[:, None]
    total = jnp.sum(jnp.where(mask, jnp.exp(inputs.reference_logprobs()), 0.0), axis=-1)
    return total / jnp.maximum(mask.sum(axis=-1), 1)


@REWARDS.register("log_prob", prompt_passes=2, response_passes=2, end_of_thinking=True, fields=("reference_tokens",))
def log_probability_reward(inputs: RewardInputs) -> jax.Array:
    """log p(reference | x_<t, reasoning), which does not vanish for long references (2602.03979)."""
    return jnp.sum(jnp.where(inputs.reference_mask_PxK[:, None], inputs.reference_logprobs(), 0.0), axis=-1)


@REWARDS.register("segment_prefix_share", targets=("segment",))
def segment_prefix_share_reward(inputs: RewardInputs) -> jax.Array:
    """The share of the segment's tokens that are predicted, if the prediction is right by Equation 3; else 0.

    So a wrong byte, a part of a token or text behind the segment costs everything, and a longer right prediction earns more. RLPT
    (2509.19249) gives the same 1 to every valid prefix, as "prefix" does.
    """
    return inputs.matched_PxG * inputs.common_prefix_share()


@REWARDS.register("segment_common_prefix", targets=("segment",))
def segment_common_prefix_reward(inputs: RewardInputs) -> jax.Array:
    """The share of the segment's tokens that the prediction begins with; what it holds after them costs nothing (ours)."""
    return inputs.common_prefix_share()


@REWARDS.register("verified", targets=("segment",))
def verified_reward(inputs: RewardInputs) -> jax.Array:
    """The score of `questions.verifier`, with the segment's text as the accepted answer.

    It takes the place of the generative judge of RLPT (2509.19249).
    """
    return inputs.matched_PxG


# --- Additional terms.


def format_term(status_PxG: jax.Array) -> jax.Array:
    """Return 1 for a finished response with a box after its reasoning, else 0."""
    return 1.0 - jnp.isin(status_PxG, jnp.array([Status.NO_BOX, Status.NOT_FINISHED]))


def overlong_term(lengths_PxG: jax.Array, max_new_tokens: int, overlong_tokens: int) -> jax.Array:
    """Return the soft overlong punishment (DAPO, 2503.14476).

    It is 0 up to `max_new_tokens - overlong_tokens` and decreases linearly to -1 at `max_new_tokens`.
    """
    return -jnp.clip((lengths_PxG - (max_new_tokens - overlong_tokens)) / overlong_tokens, 0.0, 1.0)


def budget_term(lengths_PxG: jax.Array, budget: jax.Array) -> jax.Array:
    """Return a triangle over the reasoning length: 1 at the budget, 0 at zero and at twice the budget (2509.24375)."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(lengths_PxG - budget) / budget)


def token_budget(step: int, total_steps: int, start: int, decay: float, minimum: int) -> int:
    """Return B_t = max(B_min, floor(B_0 · γ^(t / T))) (2509.24375)."""
    return max(minimum, int(start * decay ** (step / total_steps)))
