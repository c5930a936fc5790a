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


# Fields that mean something only with certain values of another one.
_BELONGS_TO = {
    "reference_tokens": ("reward", SCORING_REWARDS),
    "baseline_decay": ("reward", ("info_gain",)),
    "advantage_epsilon": ("advantage", ("grpo", "batch")),
    "clip_low": ("loss", ("clip", "dual_clip", "gspo", "cispo")),
    "clip_high": ("loss", ("clip", "dual_clip", "gspo", "cispo")),
    "dual_clip": ("loss", ("dual_clip",)),
    "importance_low": ("importance", ("mask",)),
    "importance_high": ("importance", ("truncate", "mask")),
}
# A weight, and the fields that describe what it weighs; the first of them has no default that would do.
_WEIGHED = {
    "kl_weight": ("kl",),
    "overlong_weight": ("overlong_tokens",),
    "budget_weight": ("budget_start", "budget_decay", "budget_min"),
}


def check_objective(config: ObjectiveConfig, response_limit: int) -> None:
    """Refuse unknown names, and fields that would do nothing without another one. Raises: UserError."""
    check_choice("objective.reward", config.reward, REWARDS)
    check_choice("objective.advantage", config.advantage, ADVANTAGES)
    check_choice("objective.loss", config.loss, LOSSES)
    check_choice("objective.aggregation", config.aggregation, AGGREGATIONS)
    check_choice("objective.kl", config.kl, KLS)
    check_choice("objective.importance", config.importance, IMPORTANCES)
    values, defaults = vars(config), vars(type(config)())
    for field, (other, names) in _BELONGS_TO.items():
        if values[field] != defaults[field] and values[other] not in names:
            raise UserError(
                f"objective.{field}={values[field]} does nothing with objective.{other}='{values[other]}': it is for "
                f"{', '.join(names)}."
            )
    for weight, fields in _WEIGHED.items():
        for field in fields:
            if values[field] != defaults[field] and not values[weight]:
                raise UserError(f"objective.{field}={values[field]} does nothing while objective.{weight} is 0.")
        if values[weight] and values[fields[0]] == defaults[fields[0]]:
            raise UserError(f"objective.{weight}={values[weight]:g} needs objective.{fields[0]} too.")
    if config.loss == "gspo" and config.aggregation != "sequence_mean":
        raise UserError(
            f"objective.loss='gspo' is a mean over sequences (2507.18071, Equation 5), not "
            f"objective.aggregation='{config.aggregation}': set that to 'sequence_mean'."
        )
    if config.overlong_tokens > response_limit:
        raise UserError(
            f"objective.overlong_tokens={config.overlong_tokens} must be at most rollout.max_new_tokens={response_limit}."
        )
