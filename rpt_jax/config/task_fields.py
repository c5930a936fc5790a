"""The fields that each task does not read. Such a field is an error on the command line, where it would have no effect.

A config file may set them, because files of several tasks share a base (`configs/score_tiny.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.schema import DataConfig, Experiment
from rpt_jax.errors import UserError

# Fields, and whole sections, that neither task "pretrain" nor task "score" reads.
_RPT_ONLY = (
    "questions.",
    "traces.",
    "data.positions",
    "data.rescore_every_steps",
    "data.rescore_windows",
    "data.positions_per_window",
    "data.workers",
    "data.keep_fraction",
    "data.entropy_threshold",
    "prompt.long_context",
    "rollout.",
    "objective.",
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
# What a task that samples responses and does not train leaves unread.
_TRAINING_ONLY = (
    "objective.",
    "optimizer.",
    "training.total_steps",
    "training.minibatches_per_step",
    "training.dynamic_sampling_from",
    "training.dynamic_sampling_rounds",
    "training.microbatch_tokens",
    "training.log_rollouts_every",
    "training.kept_prompts_per_step",
    "data.workers",
    "evaluation.",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "divergence.",
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
_TRACE_FIELDS = tuple(
    f"pretrain.{field}"
    for field in ("traces", "trace_options", "traces_per_window", "recalled_tokens", "rows_per_window", "row_tokens")
)
_UNREAD = {
    "rpt": ("pretrain.export", "questions.", "traces."),
    "rft": (*_TEXT_ONLY, "traces."),
    "difficulty": (*_TEXT_ONLY, *_TRAINING_ONLY, "traces."),
    "traces": (*_TRAINING_ONLY, "cold_start.", "pretrain.", "data.rescore_every_steps", "data.rescore_windows"),
    "pretrain": (*_RPT_ONLY, "data.score_batch_windows"),
    "score": (
        *_RPT_ONLY,
        "prompt.",
        "optimizer.",
        "training.total_steps",
        "pretrain.",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "profile.",
    ),
}


def check_overrides_are_read(experiment: Experiment, overrides: Iterable[str]) -> None:
    """Refuse an assignment of the command line, `section.field=value`, whose field has no effect on the run.

    Raises: UserError.
    """
    for assignment in overrides:
        name = assignment.partition("=")[0]
        for prefixes, reason in _unread(experiment):
            if name.startswith(prefixes):
                raise UserError(f"{name} has no effect {reason}: leave --config.{name} out.", field=name)


def unread_changes(experiment: Experiment) -> list[str]:
    """Return the fields that differ from their defaults without an effect on the run, in the order of the schema."""
    defaults = dict(leaves(Experiment()))
    unread = tuple(prefix for prefixes, _ in _unread(experiment) for prefix in prefixes)
    return [
        name for name, value in leaves(experiment) if name.startswith(unread) and value != defaults.get(name, value)
    ]


def _unread(experiment: Experiment) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield fields and sections, as prefixes of names, that the run does not read, and why."""
    yield _UNREAD[experiment.task], f"with task='{experiment.task}'"
    if experiment.task == "rpt" and not experiment.cold_start.total_steps:
        yield ("cold_start.learning_rate", "pretrain."), "with cold_start.total_steps=0"
    if experiment.task == "traces":
        unread = _TEXT_ONLY if experiment.asks_questions else ("questions.",)
        yield unread, f"with traces.prompts='{experiment.traces.prompts}'"
    if not experiment.pretrain.trace_weight:
        yield _TRACE_FIELDS, "with pretrain.trace_weight=0"
    elif experiment.pretrain.traces == "sampled":
        yield ("pretrain.recalled_tokens",), "with pretrain.traces='sampled', which does not write traces"
        if experiment.task == "pretrain":
            yield ("data.min_context",), "with pretrain.traces='sampled', whose prompts have been chosen"
    if experiment.policy.path:
        yield ("pretrain.vocab_size",), "with policy.path, which has a tokenizer"
