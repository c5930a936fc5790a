"""The registry of rules.

    @RULES.register("responses_cut", tasks=("rpt", "rft"), metrics=("ended/length",))
    def responses_cut(run: RunRecord) -> Iterator[Finding]:
        ...

A rule yields findings, and none for a run that it has nothing to say about. What it needs is declared in the decorator: if a run
does not have it, the rule is not checked, and the run's diagnosis says so. A rule raises `CannotCheck` for what only it can know.
"""

from __future__ import annotations

import dataclasses

from rpt_jax.registry import Registry, Requirements

_TRAINING_TASKS = ("rpt", "rft", "pretrain")


class CannotCheck(Exception):
    """A rule cannot be checked on a run; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleRequirements(Requirements):
    """Requirements of a rule.

    Attributes:
      tasks: to which it applies.
      metrics: that a run must have.
      steps: number of steps that a run must have.
      rpt_reward: objective.reward that a run of task "rpt" must have; "" = any.
    """

    tasks: tuple[str, ...] = _TRAINING_TASKS
    metrics: tuple[str, ...] = ()
    steps: int = 10
    rpt_reward: str = ""


RULES = Registry(
    "--rule",
    (
        "rpt_jax.diagnosis.response_rules",
        "rpt_jax.diagnosis.learning_rules",
        "rpt_jax.diagnosis.data_rules",
        "rpt_jax.diagnosis.speed_rules",
        "rpt_jax.diagnosis.evaluation_rules",
    ),
    RuleRequirements,
)
