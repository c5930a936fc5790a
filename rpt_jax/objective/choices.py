"""The names that `objective.*` may have, and which of its fields go together; loads nothing of what the names stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpt_jax.errors import UserError, check_choice

if TYPE_CHECKING:
    from rpt_jax.config import ObjectiveConfig

REWARDS = ("prefix", "first_token", "dense", "conditional_dense", "info_gain", "mean_prob", "log_prob")
SCORING_REWARDS = ("info_gain", "mean_prob", "log_prob")  # Those that score the true continuation after the reasoning.
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "opo", "batch")
LOSSES = ("clip", "dual_clip", "gspo", "cispo", "reinforce")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
KLS = ("none", "k1", "k2", "k3")
IMPORTANCES = ("none", "truncate", "mask")


def check_objective(config: ObjectiveConfig, response_limit: int) -> None:
    """Refuse unknown names, and fields that would do nothing without another one. Raises: UserError."""
    check_choice("objective.reward", config.reward, REWARDS)
    check_choice("objective.advantage", config.advantage, ADVANTAGES)
    check_choice("objective.loss", config.loss, LOSSES)
    check_choice("objective.aggregation", config.aggregation, AGGREGATIONS)
    check_choice("objective.kl", config.kl, KLS)
    check_choice("objective.importance", config.importance, IMPORTANCES)
    if (config.kl == "none") != (config.kl_weight == 0):
        raise UserError(
            f"objective.kl='{config.kl}' and objective.kl_weight={config.kl_weight:g}: a KL term needs a name and a weight; "
            "set both, or leave both at their defaults."
        )
    for term, weight, name, tokens in (
        ("overlong", config.overlong_weight, "overlong_tokens", config.overlong_tokens),
        ("budget", config.budget_weight, "budget_start", config.budget_start),
    ):
        if (weight == 0) != (tokens == 0):
            raise UserError(
                f"objective.{term}_weight={weight:g} and objective.{name}={tokens}: the term needs a weight and a number of "
                "tokens; set both, or leave both at 0."
            )
    if config.overlong_tokens > response_limit:
        raise UserError(
            f"objective.overlong_tokens={config.overlong_tokens} must be at most rollout.max_new_tokens={response_limit}."
        )
    if config.reference_tokens > 1 and config.reward not in SCORING_REWARDS:
        raise UserError(
            f"objective.reference_tokens={config.reference_tokens} does nothing with objective.reward='{config.reward}': it is "
            f"for {', '.join(SCORING_REWARDS)}."
        )
