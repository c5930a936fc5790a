"""What a rule finds in a run."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple


class Severity(enum.IntEnum):
    """How much a finding matters."""

    NOTE = 1  # Good to know when the results are read.
    WARNING = 2  # The run learns less, or costs more, than it could.
    PROBLEM = 3  # The run cannot reach its purpose like this.


class Evidence(NamedTuple):
    """The mean of a metric over some steps.

    Attributes:
      metric: its name in metrics.jsonl, or a description of what was computed from rollouts.
      value: the mean.
      first_step, last_step: the steps that it is the mean of.
    """

    metric: str
    value: float
    first_step: int
    last_step: int

    @property
    def steps(self) -> str:
        """The steps in words."""
        if self.first_step == self.last_step:
            return f"step {self.last_step}"
        return f"steps {self.first_step} to {self.last_step}"


class Change(NamedTuple):
    """A config field to change.

    Attributes:
      field: its name.
      action: "raise", "lower" or "set".
      now: its value in the run; None if the run's config does not have the field.
      to: the value to set; None to raise or lower it.
    """

    field: str
    action: str
    now: Any
    to: Any = None

    def __str__(self) -> str:
        value = "" if self.to is None else f"={self.to!r}"
        return f"{self.action} {self.field}{value} (now {self.now!r})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong with a run.

    Attributes:
      severity: how much it matters.
      sentence: what is wrong, with the numbers and steps that show it.
      evidence: these numbers.
      changes: fields to change, the most promising one first.
      rule: name of the rule, which is filled in by `examination.examine`.
    """

    severity: Severity
    sentence: str
    evidence: tuple[Evidence, ...]
    changes: tuple[Change, ...]
    rule: str = ""
