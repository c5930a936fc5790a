"""The fields that a task, or a suite of the command `evaluate`, does not read: an error on the command line.

A config file may set them, because files of several tasks share a base (`configs/score_tiny.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.schema import DataConfig, Experiment, ObjectiveConfig, QuestionsConfig
from rpt_jax.errors import UserError

# What only suites of the command `evaluate` read.
_SUITE_ONLY = ("multiple_choice.", "evaluation.split")
# Fields, and whole sections, that neither task "pretrain" nor task "score" reads.
_RPT_ONLY = (
    *_SUITE_ONLY,
    "questions.",
    "traces.",
    "data.positions",
    "data.targets",
    "data.target_options",
    "data.rescore_every_steps",
    "data.rescore_windows",
    "data.positions_per_window",
    "data.workers",
    "data.keep_fraction",
    "data.entropy_threshold",
    "prompt.long_context",
    "rollout.",
    *(f"objective.{field.name}" for field in dataclasses.fields(ObjectiveConfig) if field.name != "balance_weight"),
    "training.prompts_per_step",
    "training.minibatches_per_step",
    "training.dynamic_sampling_from",
    "training.dynamic_sampling_rounds",
    "training.microbatch_tokens",
    "training.log_rollouts_every",
    "training.kept_prompts_per_step",
    "cold_start.",
    "evaluation.",
    "divergence.",
    "mesh.rollout_tensor",
)
# What leaves a task or suite that does not train unread.
_TRAINING_ONLY = (
    "policy.remat",
    "policy.lora.",
    "objective.",
    "optimizer.",
    "training.total_steps",
    "training.flops_budget",
    "training.seconds_budget",
    "training.minibatches_per_step",
    "training.dynamic_sampling_from",
    "training.dynamic_sampling_rounds",
    "training.microbatch_tokens",
    "training.log_rollouts_every",
    "training.kept_prompts_per_step",
    "data.workers",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "divergence.",
    "logging.",
    "profile.",
)
# What a task whose prompts are questions does not read.
_TEXT_ONLY = (
    *(f"data.{field.name}" for field in dataclasses.fields(DataConfig) if field.name != "workers"),
    "prompt.long_context",
    "prompt.box_reading",
    "prompt.reference_bytes",
    "objective.reward",
    "objective.reference_tokens",
    "objective.baseline_decay",
    "objective.document_weight",
    "cold_start.",
    "pretrain.",
    "evaluation.positions",
    "evaluation.unseen_positions",
)
# What the reward "verified" of task "rpt" does not read of section `questions`.
_QUESTIONS_ONLY = tuple(
    f"questions.{field.name}"
    for field in dataclasses.fields(QuestionsConfig)
    if field.name not in ("verifier", "verifier_workers", "verifier_seconds")
)
_TRACE_FIELDS = tuple(
    f"pretrain.{field}"
    for field in ("traces", "trace_options", "traces_per_window", "recalled_tokens", "rows_per_window", "row_tokens")
)
_UNREAD = {
    "rpt": (*_SUITE_ONLY, "pretrain.export", "traces."),
    "rft": (*_SUITE_ONLY, *_TEXT_ONLY, "traces."),
    "difficulty": (
        *_SUITE_ONLY,
        *_TEXT_ONLY,
        *_TRAINING_ONLY,
        "training.logit_chunk_tokens",
        "evaluation.",
        "traces.",
    ),
    "traces": (
        *_SUITE_ONLY,
        *_TRAINING_ONLY,
        "evaluation.",
        "cold_start.",
        "pretrain.",
        "data.rescore_every_steps",
        "data.rescore_windows",
    ),
    "pretrain": (*_RPT_ONLY, "data.score_batch_windows", "data.entropy_renormalized"),
    "score": (
        *_RPT_ONLY,
        "objective.balance_weight",
        "policy.remat",
        "policy.lora.",
        "data.min_context",
        "data.entropy_renormalized",
        "prompt.",
        "optimizer.",
        "training.total_steps",
        "training.flops_budget",
        "training.seconds_budget",
        "pretrain.",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "logging.",
        "profile.",
    ),
}


# What no suite that asks questions reads.
_NOT_OF_QUESTION_SUITES = (
    *_TEXT_ONLY,
    *_TRAINING_ONLY,
    "policy.preset",
    "questions.pass_rates",
    "questions.min_passes",
    "questions.max_passes",
    "traces.",
    "evaluation.every_steps",
    "evaluation.keep_rollouts",
    "evaluation.split",
)
_VERIFIERS = ("questions.verifier", "questions.verifier_seconds", "questions.verifier_workers")
_UNREAD_BY_NEXT_TOKEN = (
    *_TRAINING_ONLY,
    "questions.",
    "multiple_choice.",
    "data.positions",
    "data.keep_fraction",
    "data.entropy_threshold",
    "data.rescore_every_steps",
    "data.rescore_windows",
    "cold_start.",
    "pretrain.",
    "traces.",
    "evaluation.every_steps",
    "evaluation.keep_rollouts",
    "evaluation.unseen_positions",
)
_UNREAD_BY_SUITE = {
    "next_token": _UNREAD_BY_NEXT_TOKEN,
    "altered_reasoning": _UNREAD_BY_NEXT_TOKEN,
    "questions": (*_NOT_OF_QUESTION_SUITES, "training.logit_chunk_tokens", "multiple_choice."),
    "multiple_choice": (
        *_NOT_OF_QUESTION_SUITES,
        *_VERIFIERS,
        "training.logit_chunk_tokens",
        "evaluation.",
        "prompt.template",
        "rollout.samples_per_prompt",
        "rollout.temperature",
        "rollout.max_new_tokens",
    ),
    "multiple_choice_likelihood": (
        *_NOT_OF_QUESTION_SUITES,
        *_VERIFIERS,
        "evaluation.",
        "multiple_choice.",
        "prompt.",
        "rollout.samples_per_prompt",
        "rollout.temperature",
        "rollout.max_new_tokens",
        "rollout.top_k",
        "rollout.top_p",
        "rollout.stop_at_box",
        "rollout.decode_slots",
        "mesh.rollout_tensor",
    ),
}


def check_overrides_are_read(experiment: Experiment, overrides: Iterable[str], suite: str = "") -> None:
    """Refuse an assignment of the command line, `section.field=value`, whose field has no effect on the run.

    Args:
      experiment: the config.
      overrides: the assignments.
      suite: of the command `evaluate`; "" for a run of the config's task.

    Raises: UserError.
    """
    unread = [(_UNREAD_BY_SUITE.get(suite, ()), f"with --suite={suite}")] if suite else list(_unread(experiment))
    for assignment in overrides:
        name = assignment.partition("=")[0]
        for names, reason in unread:
            if _is_among(name, names):
                raise UserError(f"{name} has no effect {reason}: leave --config.{name} out.", field=name)


def suite_reads(suite: str, name: str) -> bool:
    """Return whether the results of a suite of the command `evaluate` may depend on a field."""
    return not _is_among(name, _UNREAD_BY_SUITE[suite])


def unread_changes(experiment: Experiment) -> list[str]:
    """Return the fields that differ from their defaults without an effect on the run, in the order of the schema."""
    defaults = dict(leaves(Experiment()))
    unread = [name for names, _ in _unread(experiment) for name in names]
    return [
        name for name, value in leaves(experiment) if _is_among(name, unread) and value != defaults.get(name, value)
    ]


def _is_among(name: str, names: Iterable[str]) -> bool:
    """Return whether a field, or an option in it, is one of `names`: fields, and sections with a dot at the end."""
    return any(name == other or name.startswith(f"{other.removesuffix('.')}.") for other in names)


def _unread(experiment: Experiment) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield fields and sections that the run does not read, and why."""
    yield _UNREAD[experiment.task], f"with task='{experiment.task}'"
    if experiment.task == "rpt":
        if experiment.objective.reward == "verified":
            yield _QUESTIONS_ONLY, "with task='rpt', whose reward 'verified' reads the verifier only"
        else:
            yield ("questions.",), "with task='rpt'"
    if experiment.task == "rpt" and not experiment.cold_start.total_steps:
        yield ("cold_start.learning_rate", "pretrain."), "with cold_start.total_steps=0"
    if experiment.task == "traces":
        unread = (*_TEXT_ONLY, "training.logit_chunk_tokens") if experiment.asks_questions else ("questions.",)
        yield unread, f"with traces.prompts='{experiment.traces.prompts}'"
    if experiment.task == "pretrain" and not experiment.data.prepared:
        yield ("data.entropy_top_k",), "with task='pretrain' and without data.prepared"
    if not experiment.pretrain.trace_weight:
        yield _TRACE_FIELDS, "with pretrain.trace_weight=0"
    elif experiment.pretrain.traces == "sampled":
        yield ("pretrain.recalled_tokens",), "with pretrain.traces='sampled', which does not write traces"
        if experiment.task == "pretrain":
            yield ("data.min_context",), "with pretrain.traces='sampled', whose prompts have been chosen"
    if not experiment.policy.lora.rank:
        yield ("policy.lora.alpha", "policy.lora.targets"), "with policy.lora.rank=0, which trains all parameters"
    if experiment.policy.path:
        yield ("pretrain.vocab_size",), "with policy.path, which has a tokenizer"
