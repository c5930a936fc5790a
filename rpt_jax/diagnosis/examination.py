"""Applies the rules to a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rpt_jax.diagnosis.finding import Finding, Severity
from rpt_jax.diagnosis.rule import RULES, CannotCheck, RuleRequirements
from rpt_jax.diagnosis.run_record import RunRecord, read_run_record
from rpt_jax.errors import UserError
from rpt_jax.registry import Choice

logger = logging.getLogger(__name__)


class NotChecked(NamedTuple):
    """A rule that was not checked, and why."""

    rule: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the rules say about a run.

    Attributes:
      workdir: directory of the run.
      task: of the run.
      step: its last step.
      total_steps: steps that it was asked for, or that it has if it is complete.
      findings: the worst ones first.
      checked: names of the rules that were checked.
      not_checked: the others.
    """

    workdir: str
    task: str
    step: int
    total_steps: int
    findings: Sequence[Finding]
    checked: Sequence[str]
    not_checked: Sequence[NotChecked]


def examine(workdir: Path, rules: Iterable[str] | None = None) -> Diagnosis:
    """Apply the rules to the run in a directory.

    Args:
      workdir: directory of the run.
      rules: names of those to apply; None for all.

    Raises: UserError, as `run_record.read_run_record`, for a task that does not train, and for an unknown rule.
    """
    run = read_run_record(workdir)
    chosen = [RULES[name] for name in (RULES if rules is None else rules)]
    if not any(run.task in rule.requirements.tasks for rule in RULES.choices()):
        raise UserError(f"--workdir={workdir} is a run of task '{run.task}', which does not train.", field="--workdir")
    findings: list[Finding] = []
    checked: list[str] = []
    not_checked: list[NotChecked] = []
    for rule in chosen:
        try:
            _check_requirements(run, rule)
            findings += [dataclasses.replace(finding, rule=rule.name) for finding in rule.function(run)]
            checked.append(rule.name)
        except CannotCheck as reason:
            not_checked.append(NotChecked(rule.name, str(reason)))
    return Diagnosis(
        workdir=str(workdir),
        task=run.task,
        step=run.last_step,
        total_steps=run.total_steps,
        findings=sorted(findings, key=lambda finding: -finding.severity),
        checked=checked,
        not_checked=not_checked,
    )


def _check_requirements(run: RunRecord, rule: Choice[RuleRequirements]) -> None:
    """Raise CannotCheck if the run does not have what the rule needs."""
    needs = rule.requirements
    if run.task not in needs.tasks:
        raise CannotCheck(f"it applies to {' and '.join(needs.tasks)} only")
    if run.task == "rpt" and needs.rpt_reward not in ("", run.config.get("objective.reward")):
        raise CannotCheck(f"it applies to rpt only with objective.reward='{needs.rpt_reward}'")
    for metric in needs.metrics:
        if not run.series(metric)[0]:
            raise CannotCheck(f"metrics.jsonl has no {metric}")
    steps = len(run.training_lines)
    if steps < needs.steps:
        raise CannotCheck(f"the run has {steps} of the {needs.steps} steps that it needs")


def describe(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as lines of text."""
    findings = diagnosis.findings
    counted = f"{len(findings)} finding{'s' if len(findings) != 1 else ''}" if findings else "no problems found"
    lines = [
        f"{diagnosis.workdir} (task {diagnosis.task}, step {diagnosis.step} of {diagnosis.total_steps}): {counted}"
    ]
    for finding in findings:
        lines += ["", f"  {finding.severity.name.lower()} ({finding.rule}): {finding.sentence}"]
        if finding.changes:
            lines.append(f"    Change: {'; '.join(map(str, finding.changes))}.")
    lines += ["", f"  {len(diagnosis.checked)} rules were checked, {len(diagnosis.not_checked)} were not."]
    lines += [f"    {rule}: not checked, because {reason}." for rule, reason in diagnosis.not_checked]
    return "\n".join(lines)


def log_verdict(workdir: Path) -> None:
    """Log the worst finding of a run that has ended, and how to see all. An error is logged: it must not end the run."""
    command = f"python -m rpt_jax.doctor --workdir={workdir}"
    try:
        diagnosis = examine(workdir)
    except Exception as error:  # noqa: BLE001
        logger.warning("The run could not be examined (%s: %s). Try %s", type(error).__name__, error, command)
        return
    if not diagnosis.checked:
        logger.info("Doctor: the run is too short to be examined; see %s", command)
        return
    if not diagnosis.findings:
        logger.info(
            "Doctor: no problems found by %d rules, %d were not checked; see %s",
            len(diagnosis.checked),
            len(diagnosis.not_checked),
            command,
        )
        return
    worst = diagnosis.findings[0]
    level = logging.INFO if worst.severity == Severity.NOTE else logging.WARNING
    logger.log(level, "Doctor: %s All findings (%d): %s", worst.sentence, len(diagnosis.findings), command)
