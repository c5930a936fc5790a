"""Rules that a config must meet: allowed names, bounds, and fields that depend on each other."""

from __future__ import annotations

from typing import Any

from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.schema import (
    ATTENTIONS,
    LONG_CONTEXTS,
    POSITIONS,
    REMATS,
    SCHEDULES,
    SOURCES,
    TASKS,
    Experiment,
    ObjectiveConfig,
)
from rpt_jax.errors import UserError, check_choice
from rpt_jax.registry import OBJECTIVE_REGISTRIES, Registry

# A weight, and the fields that describe what it weighs; the first of them has no default that would do.
_WEIGHED = {
    "kl_weight": ("kl",),
    "overlong_weight": ("overlong_tokens",),
    "budget_weight": ("budget_start", "budget_decay", "budget_min"),
}


def check_objective(config: ObjectiveConfig, response_limit: int) -> None:
    """Refuse unknown names, and fields that would do nothing without another one. Raises: UserError."""
    for registry in OBJECTIVE_REGISTRIES:
        _check_named_fields(config, registry)
    values, defaults = vars(config), vars(type(config)())
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


def _check_named_fields(config: Any, registry: Registry) -> None:
    """Check a field that names a choice, and that no field which belongs to other choices was set. Raises: UserError."""
    section, _, name = registry.field.partition(".")
    chosen = getattr(config, name)
    registry.check(chosen)
    users: dict[str, list[str]] = {}
    for choice in registry.choices():
        for field in choice.requirements.fields:
            users.setdefault(field, []).append(choice.name)
    defaults = type(config)()
    for field, names in users.items():
        value = getattr(config, field)
        if value != getattr(defaults, field) and chosen not in names:
            raise UserError(
                f"{section}.{field}={value} has no effect with {registry.field}='{chosen}': it belongs to {', '.join(names)}."
            )


def check_experiment(experiment: Experiment) -> None:
    """Refuse impossible values and combinations of fields. Raises: UserError, naming the field, its value and what was expected."""
    check_choice("task", experiment.task, TASKS)
    check_choice("policy.dtype", experiment.policy.dtype, ("float32", "bfloat16"))
    check_choice("divergence.action", experiment.divergence.action, ("warn", "stop"))
    check_choice("policy.remat", experiment.policy.remat, REMATS)
    check_choice("policy.attention", experiment.policy.attention, ATTENTIONS)
    check_choice("data.source", experiment.data.source, SOURCES)
    check_choice("data.positions", experiment.data.positions, POSITIONS)
    check_choice("prompt.long_context", experiment.prompt.long_context, LONG_CONTEXTS)
    check_choice("optimizer.schedule", experiment.optimizer.schedule, SCHEDULES)
    values = dict(leaves(experiment))
    for name, (low, high) in _BOUNDS.items():
        if not low <= values[name] <= high:
            raise UserError(f"{name}={values[name]} must be between {low:.10g} and {high:.10g}.")
    for name in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        if values[name] < 1 and values[name] != -1:
            raise UserError(f"{name}={values[name]} must be at least 1, or -1 for all devices that are left.")
    t, r = experiment.training, experiment.rollout
    if t.prompts_per_step % t.minibatches_per_step:
        raise UserError(
            f"training.minibatches_per_step={t.minibatches_per_step} must divide training.prompts_per_step={t.prompts_per_step}."
        )
    longest = experiment.prompt.max_tokens + r.max_new_tokens
    if experiment.task == "rpt" and t.microbatch_tokens < longest:
        raise UserError(
            f"training.microbatch_tokens={t.microbatch_tokens} must hold the longest prompt and response, "
            f"prompt.max_tokens + rollout.max_new_tokens = {longest}."
        )
    check_objective(experiment.objective, r.max_new_tokens)
    if (r.top_k or r.top_p < 1.0) and experiment.objective.importance == "none":
        raise UserError(
            f"rollout.top_k={r.top_k} and rollout.top_p={r.top_p} draw from another distribution than the one that is trained: "
            "leave them at 0 and 1, or weight tokens with objective.importance='truncate' or 'mask'."
        )


_MANY = 10**12
_SEEDS = 2**32 - 1  # The largest that grain takes.
_BOUNDS = {
    "mesh.rollout_tensor": (0, _MANY),
    "seed": (0, _SEEDS),
    "data.seed": (0, _SEEDS),
    "data.documents": (1, _MANY),
    "data.held_out_documents": (1, _MANY),
    "data.held_out_templates": (0, _MANY),
    "data.max_document_bytes": (1, _MANY),
    "data.max_document_tokens": (2, _MANY),
    "data.min_context": (1, _MANY),
    "data.entropy_top_k": (2, _MANY),
    "data.entropy_threshold": (0.0, 100.0),
    "data.positions_per_document": (0, _MANY),
    "data.workers": (0, 1024),
    "data.rescore_every_steps": (1, _MANY),
    "data.rescore_windows": (1, _MANY),
    "data.keep_fraction": (1e-6, 1.0),
    "prompt.max_tokens": (2, _MANY),
    "prompt.reference_bytes": (1, _MANY),
    "rollout.samples_per_prompt": (2, _MANY),
    "rollout.temperature": (1e-3, 100.0),
    "rollout.max_new_tokens": (1, _MANY),
    "rollout.top_k": (0, _MANY),
    "rollout.top_p": (1e-6, 1.0),
    "rollout.decode_slots": (0, _MANY),
    "rollout.prefill_tokens": (1, _MANY),
    "objective.advantage_epsilon": (0.0, 1.0),
    "objective.clip_low": (0.0, 1.0),
    "objective.clip_high": (0.0, _MANY),
    "objective.dual_clip": (1.0, _MANY),
    "objective.reference_tokens": (1, _MANY),
    "objective.baseline_decay": (0.0, 1.0),
    "objective.format_weight": (0.0, _MANY),
    "objective.overlong_weight": (0.0, _MANY),
    "objective.overlong_tokens": (0, _MANY),
    "objective.budget_weight": (0.0, 1.0),
    "objective.budget_start": (0, _MANY),
    "objective.budget_decay": (0.0, 1.0),
    "objective.budget_min": (1, _MANY),
    "objective.importance_low": (0.0, 1.0),
    "objective.importance_high": (1.0, _MANY),
    "objective.kl_weight": (0.0, _MANY),
    "objective.entropy_weight": (0.0, _MANY),
    "objective.document_weight": (0.0, _MANY),
    "optimizer.learning_rate": (0.0, 1.0),
    "optimizer.warmup_steps": (0, _MANY),
    "optimizer.beta1": (0.0, 0.999999),
    "optimizer.beta2": (0.0, 0.999999),
    "optimizer.epsilon": (1e-30, 1.0),
    "optimizer.weight_decay": (0.0, 1.0),
    "optimizer.max_grad_norm": (1e-9, _MANY),
    "training.total_steps": (1, _MANY),
    "training.prompts_per_step": (1, _MANY),
    "training.minibatches_per_step": (1, _MANY),
    "training.dynamic_sampling_rounds": (1, _MANY),
    "training.microbatch_tokens": (1, _MANY),
    "training.logit_chunk_tokens": (1, _MANY),
    "training.log_rollouts_every": (1, _MANY),
    "evaluation.every_steps": (1, _MANY),
    "evaluation.positions": (1, _MANY),
    "evaluation.template_positions": (1, _MANY),
    "data.score_batch_windows": (1, _MANY),
    "checkpoint.every_steps": (1, _MANY),
    "checkpoint.keep": (1, _MANY),
    "checkpoint.grace_seconds": (0.0, _MANY),
    "divergence.window": (1, _MANY),
    "divergence.reward_collapse": (0.0, 1.0),
    "divergence.entropy_floor": (0.0, _MANY),
    "divergence.mismatch_ceiling": (0.0, _MANY),
    "profile.start": (0, _MANY),
    "profile.steps": (1, 1000),
    "cold_start.total_steps": (0, _MANY),
    "cold_start.learning_rate": (0.0, 1.0),
    "pretrain.documents_per_step": (1, _MANY),
    "pretrain.document_weight": (0.0, _MANY),
    "pretrain.traces_per_document": (1, _MANY),
    "pretrain.recalled_tokens": (0, _MANY),
    "pretrain.drills_per_document": (0, _MANY),
    "pretrain.rows_per_document": (1, _MANY),
    "pretrain.row_tokens": (16, _MANY),
    "pretrain.calculation_fraction": (0.0, 1.0),
    "pretrain.calculation_position_fraction": (0.0, 1.0),
    "pretrain.trace_weight": (0.0, _MANY),
    "pretrain.vocab_size": (265, _MANY),
}
