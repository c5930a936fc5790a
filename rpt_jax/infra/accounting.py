"""What a run costs: seconds by stage, tokens, FLOPs and memory."""

from __future__ import annotations

import collections
import resource
import time
from typing import Any, NamedTuple

import jax

_compiling: collections.Counter[str] = collections.Counter()


def _count_compilation(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiling.update({"seconds": seconds, "programs": 1})


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class BatchSize(NamedTuple):
    """Real tokens of a batch of rollouts, without padding."""

    prompt_tokens: int
    response_tokens: int


class Clock:
    """Splits a run's wall-clock into stages.

    Args:
      earlier: seconds that earlier runs in the same workdir have spent.
    """

    def __init__(self, earlier: float = 0.0):
        self.earlier = earlier
        self._start = self._last = time.monotonic()
        self._laps: collections.Counter[str] = collections.Counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to `stage`."""
        now = time.monotonic()
        self._laps[stage] += now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """Wall-clock so far, that of earlier runs included."""
        return self.earlier + time.monotonic() - self._start

    def scalars(self) -> dict[str, float]:
        """Return `time/<stage>` since the last call, what of it was compiling, and the peak of the process's memory in MB.

        A program that is compiled again in the middle of a run has met a new shape or placement: steps become slow.
        """
        laps = {f"time/{stage}": seconds for stage, seconds in self._laps.items()}
        compiling = {"time/compile": _compiling["seconds"], "time/compiled_programs": _compiling["programs"]}
        self._laps.clear()
        _compiling.clear()
        # Linux counts kilobytes here.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return laps | compiling | {"time/step": sum(laps.values()), "memory/peak_mb": peak}


class Counters:
    """Tokens and FLOPs of training so far; saved with every checkpoint.

    A forward pass costs 2 FLOPs a token for each of the N parameters that it is multiplied with, and forward plus backward 6;
    attention is left out. Every rollout costs, also one that dynamic sampling discards; evaluation and scoring are not training.

    Args:
      matmul_parameters: N.
    """

    def __init__(self, matmul_parameters: int):
        self._n = matmul_parameters
        self.generated = 0
        self.discarded = 0
        self.learnt = 0
        self.flops = 0.0

    def count_rollouts(self, size: BatchSize) -> int:
        """Count prompts that were prefilled once each and their responses; return the number of response tokens."""
        self.generated += size.response_tokens
        self.flops += 2.0 * self._n * (size.prompt_tokens + size.response_tokens)
        return size.response_tokens

    def count_update(self, size: BatchSize, processed: int, generated: int) -> None:
        """Count one update.

        Args:
          size: of the batch that was learnt from.
          processed: response tokens of it that went through the trunk; groups without a gradient do not.
          generated: response tokens of this step; more than the batch holds where dynamic sampling replaced groups.
        """
        self.discarded += generated - size.response_tokens
        self.learnt += processed
        share = processed / max(size.response_tokens, 1)
        self.flops += 6.0 * self._n * (share * size.prompt_tokens + processed)

    def scalars(self) -> dict[str, float]:
        return {
            "tokens/generated_total": self.generated,
            "tokens/discarded_total": self.discarded,
            "tokens/learnt_total": self.learnt,
            "flops/train_total": self.flops,
        }

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
