"""Rules that a config must meet: allowed names, bounds, and fields that depend on each other."""

from __future__ import annotations

import math
from typing import Any

from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.schema import (
    ATTENTIONS,
    BOX_READINGS,
    DIVERGENCE_ACTIONS,
    DTYPES,
    EVALUATION_SPLITS,
    HEAD_PRECISIONS,
    LONG_CONTEXTS,
    LORA_TARGETS,
    PRECISIONS,
    REMATS,
    SCHEDULES,
    TASKS,
    TEMPLATE_SEPARATOR,
    TRACE_PROMPTS,
    TRACKERS,
    UNPARSED,
    DataConfig,
    Experiment,
    LoggingConfig,
    LoraConfig,
    ObjectiveConfig,
    PolicyConfig,
    QuestionsConfig,
    tracker_names,
)
from rpt_jax.config.user_paths import PATH_FIELDS, check_location
from rpt_jax.errors import UserError, check_choice
from rpt_jax.registry import (
    CORPUS_SOURCES,
    OBJECTIVE_REGISTRIES,
    POSITION_CHOICES,
    QUESTION_SOURCES,
    REWARDS,
    TARGETS,
    TRACE_WRITERS,
    VERIFIERS,
    Registry,
)

# Fields with a fixed set of names. All other fields that name something are checked against their registry.
_NAMES = {
    "task": TASKS,
    "policy.dtype": DTYPES,
    "policy.precision": PRECISIONS,
    "policy.head_precision": HEAD_PRECISIONS,
    "policy.remat": REMATS,
    "policy.attention": ATTENTIONS,
    "prompt.long_context": LONG_CONTEXTS,
    "prompt.box_reading": BOX_READINGS,
    "optimizer.schedule": SCHEDULES,
    "divergence.action": DIVERGENCE_ACTIONS,
    "traces.prompts": TRACE_PROMPTS,
    "evaluation.split": EVALUATION_SPLITS,
    "multiple_choice.unparsed": UNPARSED,
}
# Each weight of the objective, and the fields that have no effect while it is 0. A weight other than 0 needs the first of them.
_WEIGHTED_TERMS = {
    "kl_weight": ("kl",),
    "overlong_weight": ("overlong_tokens",),
    "budget_weight": ("budget_start", "budget_decay", "budget_min"),
}

# Fields that must keep their default where the prompts are questions, and why.
_NOT_OF_QUESTIONS = {
    "objective.reward": "a question has no true continuation, and the reward is that of questions.verifier",
    "objective.document_weight": "a question has no document",
    "prompt.box_reading": "verifiers read the box up to the brace that balances it",
    "cold_start.total_steps": "it pre-trains on a corpus; start from the policy of a run of task 'rpt' or 'pretrain' instead",
}

_UNBOUNDED = 10**12  # An upper bound that excludes only typing errors.
_SEEDS = 2**32 - 1  # The largest seed that grain accepts.
# Least and greatest value of each number.
_BOUNDS = {
    "mesh.rollout_tensor": (0, _UNBOUNDED),
    "policy.lora.rank": (0, _UNBOUNDED),
    "policy.lora.alpha": (1e-6, _UNBOUNDED),
    "seed": (0, _SEEDS),
    "data.seed": (0, _SEEDS),
    "data.held_out_documents": (1, _UNBOUNDED),
    "data.max_document_bytes": (1, _UNBOUNDED),
    "data.max_document_tokens": (2, _UNBOUNDED),
    "data.min_context": (1, _UNBOUNDED),
    "data.score_batch_windows": (1, _UNBOUNDED),
    "data.entropy_top_k": (2, _UNBOUNDED),
    "data.entropy_threshold": (0.0, 100.0),
    "data.positions_per_window": (0, _UNBOUNDED),
    "data.workers": (0, 1024),
    "data.rescore_every_steps": (1, _UNBOUNDED),
    "data.rescore_windows": (1, _UNBOUNDED),
    "data.keep_fraction": (1e-6, 1.0),
    "questions.seed": (0, _SEEDS),
    "questions.train_questions": (0, _UNBOUNDED),
    "questions.test_questions": (0, _UNBOUNDED),
    "questions.verifier_workers": (0, 1024),
    "questions.verifier_seconds": (0.1, 3600.0),
    "questions.min_passes": (0, _UNBOUNDED),
    "questions.max_passes": (-1, _UNBOUNDED),
    "prompt.max_tokens": (2, _UNBOUNDED),
    "prompt.reference_bytes": (1, _UNBOUNDED),
    "rollout.samples_per_prompt": (2, _UNBOUNDED),
    "rollout.temperature": (1e-3, 100.0),
    "rollout.max_new_tokens": (1, _UNBOUNDED),
    "rollout.top_k": (0, _UNBOUNDED),
    "rollout.top_p": (1e-6, 1.0),
    "rollout.decode_slots": (0, _UNBOUNDED),
    "rollout.prefill_tokens": (1, _UNBOUNDED),
    "objective.advantage_epsilon": (0.0, 1.0),
    "objective.clip_low": (0.0, 1.0),
    "objective.clip_high": (0.0, _UNBOUNDED),
    "objective.dual_clip": (1.0, _UNBOUNDED),
    "objective.reference_tokens": (1, _UNBOUNDED),
    "objective.baseline_decay": (0.0, 1.0),
    "objective.format_weight": (0.0, _UNBOUNDED),
    "objective.overlong_weight": (0.0, _UNBOUNDED),
    "objective.overlong_tokens": (0, _UNBOUNDED),
    "objective.budget_weight": (0.0, 1.0),
    "objective.budget_start": (0, _UNBOUNDED),
    "objective.budget_decay": (0.0, 1.0),
    "objective.budget_min": (1, _UNBOUNDED),
    "objective.importance_low": (0.0, 1.0),
    "objective.importance_high": (1.0, _UNBOUNDED),
    "objective.kl_weight": (0.0, _UNBOUNDED),
    "objective.entropy_weight": (0.0, _UNBOUNDED),
    "objective.document_weight": (0.0, _UNBOUNDED),
    "objective.balance_weight": (0.0, _UNBOUNDED),
    "optimizer.learning_rate": (0.0, 1.0),
    "optimizer.warmup_steps": (0, _UNBOUNDED),
    "optimizer.beta1": (0.0, 0.999999),
    "optimizer.beta2": (0.0, 0.999999),
    "optimizer.epsilon": (1e-30, 1.0),
    "optimizer.weight_decay": (0.0, 1.0),
    "optimizer.max_grad_norm": (1e-9, _UNBOUNDED),
    "training.total_steps": (1, _UNBOUNDED),
    "training.flops_budget": (0.0, math.inf),
    "training.seconds_budget": (0.0, math.inf),
    "training.prompts_per_step": (1, _UNBOUNDED),
    "training.minibatches_per_step": (1, _UNBOUNDED),
    "training.dynamic_sampling_rounds": (1, _UNBOUNDED),
    "training.microbatch_tokens": (0, _UNBOUNDED),
    "training.logit_chunk_tokens": (0, _UNBOUNDED),
    "training.log_rollouts_every": (1, _UNBOUNDED),
    "training.kept_prompts_per_step": (0, _UNBOUNDED),
    "evaluation.every_steps": (1, _UNBOUNDED),
    "evaluation.positions": (1, _UNBOUNDED),
    "evaluation.unseen_positions": (1, _UNBOUNDED),
    "evaluation.samples": (0, _UNBOUNDED),
    "evaluation.prompts_per_batch": (0, _UNBOUNDED),
    "evaluation.temperature": (0.0, 100.0),
    "evaluation.max_new_tokens": (0, _UNBOUNDED),
    "multiple_choice.samples": (1, _UNBOUNDED),
    "multiple_choice.temperature": (1e-3, 100.0),
    "multiple_choice.max_new_tokens": (1, _UNBOUNDED),
    "checkpoint.every_steps": (1, _UNBOUNDED),
    "checkpoint.keep": (1, _UNBOUNDED),
    "checkpoint.grace_seconds": (0.0, _UNBOUNDED),
    "divergence.window": (1, _UNBOUNDED),
    "divergence.reward_collapse": (0.0, 1.0),
    "divergence.entropy_floor": (0.0, _UNBOUNDED),
    "divergence.mismatch_ceiling": (0.0, _UNBOUNDED),
    "profile.start": (0, _UNBOUNDED),
    "profile.steps": (1, 1000),
    "cold_start.total_steps": (0, _UNBOUNDED),
    "cold_start.learning_rate": (0.0, 1.0),
    "pretrain.windows_per_step": (1, _UNBOUNDED),
    "pretrain.document_weight": (0.0, _UNBOUNDED),
    "pretrain.traces_per_window": (1, _UNBOUNDED),
    "pretrain.recalled_tokens": (0, _UNBOUNDED),
    "pretrain.rows_per_window": (1, _UNBOUNDED),
    "pretrain.row_tokens": (16, _UNBOUNDED),
    "pretrain.trace_weight": (0.0, _UNBOUNDED),
    "pretrain.vocab_size": (265, _UNBOUNDED),
    "traces.total_prompts": (1, _UNBOUNDED),
    "traces.kept_per_prompt": (1, _UNBOUNDED),
}


def check_experiment(experiment: Experiment, *, trains: bool = True) -> None:
    """Refuse impossible values and combinations of fields.

    Args:
      experiment: the config.
      trains: whether it is to be trained by; an evaluation is not bound by what only training needs.

    Raises: UserError, naming the field, its value and what was expected.
    """
    values = dict(leaves(experiment))

    # Names, and the fields that belong to the named choices.
    for name, allowed in _NAMES.items():
        check_choice(name, values[name], allowed)
    _check_named_choice(experiment.data, CORPUS_SOURCES)
    _check_named_choice(experiment.data, POSITION_CHOICES)
    _check_named_choice(experiment.data, TARGETS)
    _check_named_choice(experiment.questions, QUESTION_SOURCES)
    _check_named_choice(experiment.questions, VERIFIERS)
    _check_named_choice(experiment.pretrain, TRACE_WRITERS)
    for registry in OBJECTIVE_REGISTRIES:
        _check_named_choice(experiment.objective, registry)

    for name in PATH_FIELDS:
        check_location(name, values[name])

    # Numbers.
    for name, (low, high) in _BOUNDS.items():
        if not low <= values[name] <= high:
            expected = (
                f"at least {low:.10g}" if high in (_UNBOUNDED, math.inf) else f"between {low:.10g} and {high:.10g}"
            )
            raise UserError(f"{name}={values[name]} must be {expected}.", field=name)
    for name in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        if values[name] < 1 and values[name] != -1:
            raise UserError(f"{name}={values[name]} must be at least 1, or -1 for all remaining devices.", field=name)

    # Fields that depend on each other.
    _check_precision(experiment.policy)
    _check_lora_targets(experiment.policy.lora)
    _check_weighted_terms(experiment.objective)
    _check_question_task(experiment)
    _check_positions_of_traces(experiment)
    _check_targets(experiment)
    _check_data_fields(experiment)
    _check_question_fields(experiment.questions)
    _check_evaluation_temperature(experiment.evaluation.temperature)
    _check_budget(experiment)
    _check_trackers(experiment.logging)
    _check_box_reading(experiment)
    _check_context(experiment)
    if trains:
        _check_sizes(experiment)
        _check_sampling_distribution(experiment)
        _check_frozen_weights(experiment)
        _check_effects(experiment)
        _check_objective(experiment)


def _check_named_choice(section: Any, registry: Registry) -> None:
    """Check a field that names a registered choice, and the fields that belong to it. Raises: UserError."""
    prefix, _, name = registry.field.partition(".")
    chosen = getattr(section, name)
    registry.check(chosen)
    defaults = type(section)()
    owners: dict[str, list[str]] = {}
    for choice in registry.choices():
        for field in choice.requirements.fields:
            owners.setdefault(field, []).append(choice.name)
        if choice.name == chosen:
            for field, needed in choice.requirements.needs:
                value = getattr(section, field)
                if value != needed:
                    raise UserError(
                        f"{registry.field}='{chosen}' needs {prefix}.{field}='{needed}', not '{value}'.",
                        field=f"{prefix}.{field}",
                    )
    for field, names in owners.items():
        value = getattr(section, field)
        if value != getattr(defaults, field) and chosen not in names:
            raise UserError(
                f"{prefix}.{field}={value} has no effect with {registry.field}='{chosen}': "
                f"it belongs to {', '.join(names)}. Set {registry.field}, or leave {prefix}.{field} out.",
                field=f"{prefix}.{field}",
            )


def _check_data_fields(experiment: Experiment) -> None:
    """Refuse fields of section "data" that have no effect. Raises: UserError."""
    data = experiment.data
    if data.shard and experiment.task != "score":
        raise UserError(
            f"data.shard='{data.shard}' has no effect with task='{experiment.task}': it belongs to task 'score'.",
            field="data.shard",
        )
    if data.prepared and experiment.task == "score":
        raise UserError(
            f"data.prepared='{data.prepared}' has no effect with task='score', which prepares the corpus in --workdir.",
            field="data.prepared",
        )
    # In a mixture, a part with an empty template uses its text field.
    has_only_templates = all(data.document_template.split(TEMPLATE_SEPARATOR))
    if has_only_templates and data.text_field != type(data)().text_field:
        raise UserError(
            f"data.text_field='{data.text_field}' has no effect with data.document_template={data.document_template!r}: give one "
            "of the two.",
            field="data.text_field",
        )


def _check_question_task(experiment: Experiment) -> None:
    """Refuse what a run on questions would do otherwise than the config says. Raises: UserError."""
    if not experiment.asks_questions:
        return
    values = dict(leaves(experiment))
    defaults = dict(leaves(Experiment()))
    for name, reason in _NOT_OF_QUESTIONS.items():
        if values[name] != defaults[name]:
            raise UserError(
                f"{name}={values[name]!r} has no effect with task='{experiment.task}': {reason}. Leave it out.",
                field=name,
            )


def _check_positions_of_traces(experiment: Experiment) -> None:
    """Refuse positions that change in the course of training: task "traces" does not train. Raises: UserError."""
    if experiment.task != "traces" or experiment.asks_questions:
        return
    data = experiment.data
    requirements = POSITION_CHOICES[data.positions].requirements
    if requirements.staged or requirements.rescored:
        raise UserError(
            f"data.positions='{data.positions}' changes in the course of training, which task 'traces' does not do: choose "
            "another, such as 'threshold'.",
            field="data.positions",
        )


def _check_targets(experiment: Experiment) -> None:
    """Refuse fields that do not suit `data.targets`, and a verifier that cannot verify segments. Raises: UserError."""
    if experiment.task not in ("rpt", "traces") or experiment.asks_questions:
        return
    targets = experiment.data.targets
    kind = "segment" if TARGETS[targets].requirements.segments else "token"
    reward = experiment.objective.reward
    if kind not in REWARDS[reward].requirements.targets:
        others = [choice.name for choice in REWARDS.choices() if kind in choice.requirements.targets]
        raise UserError(
            f"objective.reward='{reward}' does not suit data.targets='{targets}'. These do: {', '.join(others)}.",
            field="objective.reward",
        )
    if kind == "segment":
        _check_segments(experiment)


def _check_segments(experiment: Experiment) -> None:
    """Refuse fields that do not suit segments, in task "rpt" or "traces". Raises: UserError."""
    targets = experiment.data.targets
    if experiment.task == "rpt" and experiment.cold_start.total_steps:
        raise UserError(
            f"cold_start.total_steps={experiment.cold_start.total_steps} does not suit data.targets='{targets}': written traces "
            "predict tokens. Run it with data.targets='token' first, and start from the policy of that run.",
            field="cold_start.total_steps",
        )
    options = experiment.data.target_options
    right_context = getattr(options, "right_context", 0)
    if right_context and experiment.objective.document_weight:
        raise UserError(
            f"objective.document_weight={experiment.objective.document_weight:g} does not suit "
            f"data.target_options.right_context={right_context}: the documents tell what comes between the texts of a prompt.",
            field="objective.document_weight",
        )
    tokens = getattr(options, "tokens", 1)
    limit = experiment.rollout.max_new_tokens
    if tokens >= limit:
        raise UserError(
            f"data.target_options.tokens={tokens} must be less than rollout.max_new_tokens={limit}: a response reasons, and then "
            "holds the segment.",
            field="data.target_options.tokens",
        )
    if experiment.objective.reward == "verified":
        _check_verified_reward(experiment)


def _check_verified_reward(experiment: Experiment) -> None:
    """Refuse a verifier that needs more than the text of a segment, or a box that it does not read. Raises: UserError."""
    verifier = experiment.questions.verifier
    requirements = VERIFIERS[verifier].requirements
    if requirements.choices or not requirements.answers:
        others = [
            choice.name
            for choice in VERIFIERS.choices()
            if choice.requirements.answers and not choice.requirements.choices
        ]
        raise UserError(
            f"questions.verifier='{verifier}' does not suit objective.reward='verified': a segment is a text without options. "
            f"These do: {', '.join(others)}.",
            field="questions.verifier",
        )
    reading = experiment.prompt.box_reading
    if requirements.box and reading != "balanced":
        raise UserError(
            f"prompt.box_reading='{reading}' has no effect with objective.reward='verified': verifiers read the box up to the "
            "brace that balances it. Leave it out.",
            field="prompt.box_reading",
        )


def _check_trackers(logging: LoggingConfig) -> None:
    """Check the names of trackers, and refuse a project without one. Raises: UserError."""
    names = tracker_names(logging.trackers)
    for name in names:
        check_choice("logging.trackers", name, TRACKERS)
    if logging.project != LoggingConfig().project and not names:
        raise UserError(
            f"logging.project='{logging.project}' has no effect without logging.trackers.", field="logging.project"
        )


def _check_question_fields(questions: QuestionsConfig) -> None:
    """Refuse fields of section "questions" that have no effect, and bounds of passes that exclude all. Raises: UserError."""
    defaults = QuestionsConfig()
    if questions.question_template and questions.question_field != defaults.question_field:
        raise UserError(
            f"questions.question_field='{questions.question_field}' has no effect with "
            f"questions.question_template={questions.question_template!r}: give one of the two.",
            field="questions.question_field",
        )
    for name in ("min_passes", "max_passes"):
        value = getattr(questions, name)
        if value != getattr(defaults, name) and not questions.pass_rates:
            raise UserError(
                f"questions.{name}={value} has no effect without questions.pass_rates, the file that the difficulty filter "
                "writes.",
                field=f"questions.{name}",
            )
    if 0 <= questions.max_passes < questions.min_passes:
        raise UserError(
            f"questions.max_passes={questions.max_passes} is less than questions.min_passes={questions.min_passes}: no question "
            "would be left.",
            field="questions.max_passes",
        )


def _check_weighted_terms(config: ObjectiveConfig) -> None:
    """Refuse a weight whose term is not configured, and a configured term whose weight is 0. Raises: UserError."""
    values = vars(config)
    defaults = vars(type(config)())
    for weight, fields in _WEIGHTED_TERMS.items():
        for field in fields:
            if values[field] != defaults[field] and not values[weight]:
                raise UserError(
                    f"objective.{field}={values[field]} has no effect while objective.{weight} is 0.",
                    field=f"objective.{field}",
                )
        if values[weight] and values[fields[0]] == defaults[fields[0]]:
            raise UserError(
                f"objective.{weight}={values[weight]:g} needs objective.{fields[0]} too.",
                field=f"objective.{fields[0]}",
            )


def _check_precision(policy: PolicyConfig) -> None:
    """Refuse a precision of float32 products where the products are in bfloat16. Raises: UserError."""
    if policy.dtype != "float32" and policy.precision != PolicyConfig.precision:
        raise UserError(
            f"policy.precision={policy.precision} needs policy.dtype=float32; it is {policy.dtype}.",
            field="policy.precision",
        )


def _check_lora_targets(lora: LoraConfig) -> None:
    """Refuse an unknown name in `policy.lora.targets`. Raises: UserError."""
    if lora.targets.strip() == "all":
        return
    for name in lora.targets.split(","):
        check_choice("policy.lora.targets", name.strip(), (*LORA_TARGETS, "all"))
        if name.strip() == "all":
            raise UserError(
                f"policy.lora.targets='{lora.targets}' must be 'all' or names of matrices, not both.",
                field="policy.lora.targets",
            )


def _check_frozen_weights(experiment: Experiment) -> None:
    """Refuse to freeze random weights, which the pre-training of a new policy starts from. Raises: UserError."""
    policy = experiment.policy
    if policy.lora.rank and not policy.path and experiment.task == "pretrain":
        raise UserError(
            f"policy.lora.rank={policy.lora.rank} freezes the weights, but without policy.path they are random: give a policy, "
            "or set policy.lora.rank=0.",
            field="policy.lora.rank",
        )


def _check_sizes(experiment: Experiment) -> None:
    """Check sizes that depend on each other. Raises: UserError."""
    training = experiment.training
    max_new_tokens = experiment.rollout.max_new_tokens
    if training.prompts_per_step % training.minibatches_per_step:
        raise UserError(
            f"training.minibatches_per_step={training.minibatches_per_step} must divide "
            f"training.prompts_per_step={training.prompts_per_step}.",
            field="training.minibatches_per_step",
        )
    longest = experiment.prompt.max_tokens + max_new_tokens
    if experiment.reinforces and 0 < training.microbatch_tokens < longest:
        raise UserError(
            f"training.microbatch_tokens={training.microbatch_tokens} must hold the longest prompt and response, "
            f"prompt.max_tokens + rollout.max_new_tokens = {longest}.",
            field="training.microbatch_tokens",
        )
    overlong_tokens = experiment.objective.overlong_tokens
    if overlong_tokens > max_new_tokens:
        raise UserError(
            f"objective.overlong_tokens={overlong_tokens} must be at most rollout.max_new_tokens={max_new_tokens}.",
            field="objective.overlong_tokens",
        )


def _check_sampling_distribution(experiment: Experiment) -> None:
    """Refuse truncated sampling without a correction for it. Raises: UserError."""
    rollout = experiment.rollout
    truncated = rollout.top_k > 0 or rollout.top_p < 1.0
    if truncated and experiment.reinforces and experiment.objective.importance == "none":
        raise UserError(
            f"rollout.top_k={rollout.top_k} and rollout.top_p={rollout.top_p} sample from another distribution than the one "
            "that is trained: leave them at 0 and 1, or set objective.importance to 'truncate' or 'mask'.",
            field="objective.importance",
        )


def _check_evaluation_temperature(temperature: float) -> None:
    """Refuse temperatures between 0, which stands for that of training, and the least one. Raises: UserError."""
    least, _ = _BOUNDS["rollout.temperature"]
    if 0 < temperature < least:
        raise UserError(
            f"evaluation.temperature={temperature:g} must be at least {least:g}, or 0 for that of training.",
            field="evaluation.temperature",
        )


def _check_effects(experiment: Experiment) -> None:
    """Refuse pre-training that learns nothing, and a profile that never begins. Raises: UserError."""
    cold_start_steps = experiment.cold_start.total_steps if experiment.task == "rpt" else 0
    pretrain = experiment.pretrain
    if (
        (experiment.task == "pretrain" or cold_start_steps)
        and not pretrain.document_weight
        and not pretrain.trace_weight
    ):
        raise UserError(
            "pretrain.document_weight=0 and pretrain.trace_weight=0 leave nothing to learn: set one of them to 1.",
            field="pretrain.trace_weight",
        )
    last_step = max(experiment.training.total_steps, cold_start_steps)
    if experiment.profile.start > last_step:
        raise UserError(
            f"profile.start={experiment.profile.start} is after the last step, {last_step}: nothing would be recorded.",
            field="profile.start",
        )


def _check_objective(experiment: Experiment) -> None:
    """Refuse fields of section "objective" without effect, and a loss that does not suit minibatches. Raises: UserError."""
    if not experiment.reinforces:
        return
    objective = experiment.objective
    minibatches = experiment.training.minibatches_per_step
    for name in ("clip_low", "clip_high", "dual_clip"):
        value = getattr(objective, name)
        if minibatches == 1 and value != getattr(ObjectiveConfig(), name):
            raise UserError(
                f"objective.{name}={value} has no effect with training.minibatches_per_step=1: the policy that is updated is the "
                "one that has sampled, so that the ratio of their probabilities is 1.",
                field=f"objective.{name}",
            )
    if minibatches > 1 and objective.loss == "reinforce":
        raise UserError(
            f"objective.loss='reinforce' assumes samples of the current policy, but with training.minibatches_per_step="
            f"{minibatches} all but the first minibatch are of an earlier one: choose another loss, such as 'clip'.",
            field="objective.loss",
        )
    if objective.reference_tokens > experiment.prompt.reference_bytes:
        raise UserError(
            f"objective.reference_tokens={objective.reference_tokens} is more than the {experiment.prompt.reference_bytes} bytes "
            "of the true continuation that a prompt keeps: raise prompt.reference_bytes.",
            field="objective.reference_tokens",
        )
    verifier = experiment.questions.verifier
    if experiment.task == "rft" and objective.format_weight and not VERIFIERS[verifier].requirements.box:
        raise UserError(
            f"objective.format_weight={objective.format_weight} rewards a box, which questions.verifier='{verifier}' does not "
            "read: set it to 0.",
            field="objective.format_weight",
        )


def _check_budget(experiment: Experiment) -> None:
    """Refuse a budget beside what needs to know the number of steps. Raises: UserError."""
    training = experiment.training
    if not training.flops_budget and not training.seconds_budget:
        return
    name = "training.flops_budget" if training.flops_budget else "training.seconds_budget"
    objective = experiment.objective
    is_staged = POSITION_CHOICES[experiment.data.positions].requirements.staged
    needed = (
        ("optimizer.schedule", experiment.optimizer.schedule, "constant", True),
        ("data.positions", experiment.data.positions, DataConfig.positions, experiment.task == "rpt" and is_staged),
        ("objective.budget_decay", objective.budget_decay, 1.0, experiment.reinforces and objective.budget_weight > 0),
    )
    for field, value, expected, applies in needed:
        if applies and value != expected:
            raise UserError(
                f"{field}={value!r} spreads over training.total_steps, but {name} ends the run before: set {field}={expected!r}.",
                field=field,
            )


def _check_box_reading(experiment: Experiment) -> None:
    """Refuse to end responses at a brace with a reading that only the end of the response decides. Raises: UserError."""
    if experiment.rollout.stop_at_box and experiment.prompt.box_reading == "to_end":
        raise UserError(
            "rollout.stop_at_box=True ends a response at the brace that balances its box, but with prompt.box_reading='to_end' "
            "the box is read up to the end of the response. Set rollout.stop_at_box=False, or prompt.box_reading='balanced'.",
            field="rollout.stop_at_box",
        )


def _check_context(experiment: Experiment) -> None:
    """Refuse prompts that are too short for the least context of a position: each would be cut. Raises: UserError."""
    if experiment.task not in ("rpt", "traces") or experiment.asks_questions:
        return
    max_tokens = experiment.prompt.max_tokens
    min_context = experiment.data.min_context
    if max_tokens < min_context:
        raise UserError(
            f"prompt.max_tokens={max_tokens} must be at least data.min_context={min_context}, or every prompt would be cut.",
            field="prompt.max_tokens",
        )
