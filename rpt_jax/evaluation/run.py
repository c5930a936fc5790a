"""Run a suite: load the policy, evaluate it in batches that are kept, and write the results."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.config.derived import evaluation_experiment
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.config.task_fields import suite_reads
from rpt_jax.errors import UserError
from rpt_jax.evaluation.batch_loop import run_batches
from rpt_jax.evaluation.stored_results import RECORDS, SUMMARY, ResultStore
from rpt_jax.evaluation.suite import SUITES, SuiteInputs, difficulty_text, points, score_averages, summary_rows
from rpt_jax.infra.console import table
from rpt_jax.infra.fingerprint import fingerprint_arrays
from rpt_jax.infra.provenance import provenance
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.storage import named_by_urls, with_urls
from rpt_jax.setup import check_sampling, dtype_of, head_precision_of, load_starting_policy
from rpt_jax.sizes.plan import plan_run

logger = logging.getLogger(__name__)

# What results depend on, beside the weights of the policy and what is evaluated; all other fields change speed and memory, or
# belong to training.
_SECTIONS = ("data", "questions", "prompt", "rollout", "evaluation", "multiple_choice")
_FIELDS = (
    "seed",
    "policy.dtype",
    "policy.precision",
    "policy.head_precision",
    "training.prompts_per_step",
)
_WITHOUT_EFFECT = (
    "rollout.decode_slots",
    "rollout.prefill_tokens",
    "data.score_batch_windows",
    "questions.verifier_workers",
)


def check_task(suite: str, experiment: Experiment) -> None:
    """Check that the config is of a task that has what a suite evaluates. Raises: UserError."""
    asks = SUITES[suite].requirements.questions
    if asks != experiment.asks_questions:
        needed = (
            "asks questions: give a config of task 'rft'" if asks else "reads a corpus: give a config of task 'rpt'"
        )
        raise UserError(
            f"--suite={suite} {needed}. This one has task='{experiment.task}'.",
            field="task",
        )


def evaluate(
    suite: str,
    experiment: Experiment,
    policy: str,
    policy_field: str,
    workdir: Path,
    mesh: Mesh,
    context: RunContext,
    *,
    restart: bool,
) -> dict[str, Any]:
    """Evaluate a policy with a suite, or resume an evaluation that was interrupted.

    Args:
      suite: name of the suite.
      experiment: a validated config, of the task that `check_task` asks for.
      policy: Hugging Face directory, GGUF file or policy of a run.
      policy_field: the config field or flag that gives it, for errors.
      workdir: where the results are kept.
      mesh: the device mesh.
      context: signals and heartbeats.
      restart: delete the results that are there.

    Returns: the content of `evaluation.json`.

    Raises: UserError, if the policy, the corpus or the questions cannot be used, or `workdir` has results of other settings.
    """
    requirements = SUITES[suite].requirements
    subject = dataclasses.replace(experiment.policy, path=policy, preset="")

    # Plan the memory for the policy that is evaluated and the sampling of the suite. The task is one that only samples.
    sampled = (requirements.sampling or evaluation_experiment)(experiment)
    planned = plan_run(dataclasses.replace(sampled, task="difficulty", policy=subject), mesh)
    check_sampling(planned, mesh)
    planned = dataclasses.replace(planned, task=experiment.task, policy=experiment.policy)

    model, params, tokenizer = load_starting_policy(subject, mesh, policy_field)
    fingerprint = fingerprint_arrays(params)
    settings = {"--suite": suite, "--policy": fingerprint, "tokenizer": tokenizer.fingerprint} | _settings(
        suite, experiment
    )
    store = ResultStore(workdir, settings, restart=restart)
    if finished := store.summary():
        logger.info("This evaluation is complete: %s. Give --restart to repeat it.", workdir / SUMMARY)
        show(finished)
        return finished

    inputs = SuiteInputs(planned, model, params, tokenizer, mesh, workdir, context)
    batches = SUITES[suite].function(inputs)
    store.check_evaluated(batches.fingerprint)
    context.signals.set_kept(lambda: f"the complete batches are in {workdir}")
    start = time.monotonic()
    try:
        busy = run_batches(f"evaluate {suite}, batches", batches, store)
    finally:
        if close := getattr(batches, "close", None):
            close()
    records = store.read(batches.count)
    summary = {
        **provenance(),
        "suite": suite,
        "policy": with_urls(policy),
        "policy_fingerprint": fingerprint,
        "seconds": time.monotonic() - start,
        "device_busy": busy,
        "scores": score_averages(records),
        "summary": batches.summary(records),
        "config": named_by_urls(experiment),
    }
    store.finish(records, summary)
    show(summary)
    logger.info("Results: %s and %s", workdir / SUMMARY, workdir / RECORDS)
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print the table of an evaluation, and what describes it.

    Args:
      summary: the content of `evaluation.json`.
    """
    title = f"Suite {summary['suite']}, {summary['policy']} (%, 95 % interval)"
    details = dict(summary["summary"])
    if difficulties := details.pop("difficulties", None):
        rows: Sequence[tuple[str, ...]] = [
            (measure, *(difficulty_text(by_level[level]) for level in DIFFICULTIES))
            for measure, by_level in difficulties.items()
        ]
        table(title, ("measure", *DIFFICULTIES), rows)
    else:
        table(title, ("measure", "mean", "questions"), summary_rows(summary["scores"]))
    if differences := details.pop("differences", None):
        rows = [(name, points(each["mean"], each["low"], each["high"])) for name, each in differences.items()]
        table("Differences (points, 95 % interval)", ("reasoning", "difference"), rows)
    parts = [f"{name} {value:.4g}" for name, value in _flat(details)]
    if summary["device_busy"] is not None:
        parts.append(f"device busy {100 * summary['device_busy']:.1f} %")
    logger.info(", ".join(parts))


def _flat(details: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the numbers of nested details by name."""
    flat = []
    for name, value in details.items():
        flat += [(f"{name}/{key}", v) for key, v in value.items()] if isinstance(value, dict) else [(name, value)]
    return flat


def _settings(suite: str, experiment: Experiment) -> dict[str, Any]:
    """Return the fields of a config that the results of a suite depend on, with the precision of these devices."""
    policy = experiment.policy
    policy = dataclasses.replace(policy, dtype=dtype_of(policy), head_precision=head_precision_of(policy))
    return {
        name: value
        for name, value in named_by_urls(dataclasses.replace(experiment, policy=policy)).items()
        if (name in _FIELDS or name.partition(".")[0] in _SECTIONS)
        and name not in _WITHOUT_EFFECT
        and suite_reads(suite, name)
    }
