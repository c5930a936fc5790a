"""What a run shares with its process: stop signals, heartbeats, the other processes and the compile-time listener."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rpt_jax.distributed.processes import in_any_process
from rpt_jax.distributed.rendezvous import Heartbeat, Rendezvous
from rpt_jax.infra.accounting import CompileTimes
from rpt_jax.infra.signals import StopSignals


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """Made once in `main` and passed to the task. The default is a single process without signal handlers.

    Attributes:
      signals: saves the run when a stop signal arrives.
      heartbeat: fed by the loops after each phase, so that the processes of a run notice when one of them stalls.
      compile_times: counts compiled programs.
      rendezvous: the other processes of the run; None for a single process.
    """

    signals: StopSignals = dataclasses.field(default_factory=StopSignals)
    heartbeat: Heartbeat = dataclasses.field(default_factory=Heartbeat)
    compile_times: CompileTimes = dataclasses.field(default_factory=CompileTimes)
    rendezvous: Rendezvous | None = None

    def stop_if_requested(self, save: Callable[[], str]) -> None:
        """Save and exit all processes if one of them received a stop signal. Every process calls this after each step.

        A single process does nothing here: its signal thread saves by itself, in the middle of a step.

        Args:
          save: saves the run, together with the other processes; returns a few words on what was saved.
        """
        if self.rendezvous is None or not in_any_process(self.signals.requested):
            return
        saved = save()
        self.rendezvous.leave()
        self.signals.exit_stopped(saved)
