"""The cost of a run: seconds by phase, tokens, FLOPs, compilations and memory."""

from __future__ import annotations

import collections
import functools
import os
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.infra.chips import published_flops

# The phases of a step that count as training, for MFU and tokens per second.
_TRAINING_PHASES = ("data", "reshard", "rollout", "reward", "update")


class CompileTimes:
    """Counts the programs that XLA compiles, and the seconds that this takes, between `start` and `stop`.

    Attributes:
      total_seconds: of all compilations so far.
    """

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self._seconds = 0.0
        self._programs = 0

    def start(self) -> None:
        """Listen to JAX's compilation events."""
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def stop(self) -> None:
        """Stop listening; the counts remain."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._seconds += duration_secs
            self.total_seconds += duration_secs
            self._programs += 1

    def take(self) -> dict[str, float]:
        """Return the scalars since the last call."""
        scalars = {"time/compile": self._seconds, "time/compiled_programs": float(self._programs)}
        self._seconds = 0.0
        self._programs = 0
        return scalars


@functools.cache
def peak_flops() -> float:
    """Return the peak FLOP/s of one device: the published figure, or a measured one for devices that are not listed.

    The measured figure is the best of five float32 products of 1024 × 1024 matrices.
    """
    if peak := published_flops(jax.devices()[0].device_kind):
        return peak
    x = jax.device_put(np.ones((1024, 1024), np.float32))
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - start)
    # The first product compiles.
    return 2.0 * 1024**3 / min(seconds[1:]) / jax.local_device_count()


def memory_scalars() -> dict[str, float]:
    """Return the peak memory of this process in MB; on Linux also its current memory, memory maps and open files.

    Every compiled program holds memory maps, of which Linux allows 65,530 per process.
    """
    # Linux reports kilobytes.
    scalars = {"memory/peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    process = Path("/proc/self")
    if (process / "statm").exists():
        pages = int((process / "statm").read_text().split()[1])
        scalars["memory/resident_mb"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        scalars["memory/maps"] = (process / "maps").read_bytes().count(b"\n")
        scalars["memory/open_files"] = len(os.listdir(process / "fd"))
    return scalars


class BatchSize(NamedTuple):
    """Number of tokens in a batch of rollouts, without padding."""

    prompt_tokens: int
    response_tokens: int


class RolloutCost(NamedTuple):
    """Tokens of rollouts, without padding, and the FLOPs of sampling and rewarding them."""

    prompt_tokens: int
    response_tokens: int
    flops: float

    def plus(self, other: RolloutCost) -> RolloutCost:
        """Return the cost of both."""
        return RolloutCost(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            response_tokens=self.response_tokens + other.response_tokens,
            flops=self.flops + other.flops,
        )


class Clock:
    """Splits the wall-clock time of a run into phases.

    Args:
      compile_times: counts compilations.
      earlier: seconds that earlier runs in the same workdir took.

    Attributes:
      earlier: see above.
      evaluation: seconds of phase "evaluation" so far, earlier runs included.
    """

    def __init__(self, compile_times: CompileTimes, earlier: float = 0.0):
        self.earlier = earlier
        self.evaluation = 0.0
        self._compile_times = compile_times
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = collections.defaultdict(float)

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        now = time.monotonic()
        self._laps[phase] += now - self._last
        if phase == "evaluation":
            self.evaluation += now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far, including earlier runs."""
        return self.earlier + time.monotonic() - self._start

    @property
    def training_seconds(self) -> float:
        """Seconds so far without evaluations."""
        return self.seconds - self.evaluation

    def speed(self, flops: float, tokens: int) -> dict[str, float]:
        """Return generated tokens per second and MFU over the training phases since the last `scalars`.

        Args:
          flops: FLOPs of these phases.
          tokens: tokens that were generated in them.
        """
        seconds = max(1e-9, sum(seconds for phase, seconds in self._laps.items() if phase in _TRAINING_PHASES))
        peak = jax.device_count() * peak_flops()
        return {"speed/tokens_per_second": tokens / seconds, "speed/mfu": flops / seconds / peak}

    def scalars(self) -> dict[str, float]:
        """Return `time/<phase>` since the last call, compile times and memory use.

        A program that is compiled in the middle of a run has a new input shape or sharding, which makes steps slow.
        """
        laps = {f"time/{phase}": seconds for phase, seconds in self._laps.items()}
        self._laps.clear()
        return laps | self._compile_times.take() | {"time/step": sum(laps.values())} | memory_scalars()


# The attributes of `Counters` that a checkpoint holds.
_SAVED_COUNTS = ("generated", "discarded", "learned", "flops", "discarded_flops")


class Counters:
    """Tokens and model FLOPs (see `model.flops`) of training so far; saved with every checkpoint.

    Every rollout counts, including those that dynamic sampling discards, and so do a cold start and the documents that the
    proxy or the policy scores to choose positions. Evaluation is not training and does not count.

    Attributes:
      generated: response tokens of all rollouts.
      discarded: those of rollouts that dynamic sampling discarded.
      learned: response tokens that had a gradient.
      flops: FLOPs of training.
      discarded_flops: those of rollouts that dynamic sampling discarded, by their share of the tokens.
    """

    def __init__(self) -> None:
        self.generated = 0
        self.discarded = 0
        self.learned = 0
        self.flops = 0.0
        self.discarded_flops = 0.0

    def count_rollouts(self, cost: RolloutCost) -> None:
        """Count rollouts that were sampled and rewarded."""
        self.generated += cost.response_tokens
        self.flops += cost.flops

    def count_update(self, *, used: BatchSize, generated: RolloutCost, learned: int, flops: float) -> None:
        """Count one update.

        Args:
          used: size of the batch of the update.
          generated: all rollouts of the step; more than `used` if dynamic sampling replaced groups.
          learned: response tokens that have a gradient.
          flops: FLOPs of the update.
        """
        tokens = generated.prompt_tokens + generated.response_tokens
        self.discarded += generated.response_tokens - used.response_tokens
        self.discarded_flops += generated.flops * (1.0 - (used.prompt_tokens + used.response_tokens) / tokens)
        self.learned += learned
        self.flops += flops

    def count_flops(self, flops: float) -> None:
        """Count what is neither a rollout nor an update: a cold start, or documents that were scored."""
        self.flops += flops

    def scalars(self) -> dict[str, float]:
        """Return the totals by their names in metrics.jsonl."""
        return {
            "tokens/generated_total": self.generated,
            "tokens/discarded_total": self.discarded,
            "tokens/learned_total": self.learned,
            "flops/train_total": self.flops,
            "flops/discarded_total": self.discarded_flops,
        }

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON values, for `restore`."""
        return {name: getattr(self, name) for name in _SAVED_COUNTS}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the counts that `state` returned."""
        for name in _SAVED_COUNTS:
            setattr(self, name, state[name])
