"""What a run costs: seconds by stage, tokens, FLOPs and memory."""

from __future__ import annotations

import collections
import functools
import os
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.distributed.rendezvous import at
from rpt_jax.infra.chips import published_flops

_compiling: collections.Counter[str] = collections.Counter()


def _count_compilation(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiling.update({"seconds": seconds, "programs": 1})


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


# The stages of a step that MFU is of.
_TRAINING = ("data", "reshard", "rollout", "reward", "update")


@functools.cache
def peak_flops() -> float:
    """FLOP/s of one device: its maker's figure in bfloat16 or, of devices not listed, what the best of five products reaches."""
    if peak := published_flops(jax.devices()[0].device_kind):
        return peak
    x, seconds = jax.device_put(np.ones((1024, 1024), np.float32)), []
    multiply = jax.jit(jnp.matmul)
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - start)
    return 2.0 * 1024**3 / min(seconds[1:]) / jax.local_device_count()


def memory_scalars() -> dict[str, float]:
    """The most memory that this process had at one time, in MB; on Linux also what it has now, and what else it may run out of.

    Every compiled program holds memory maps, of which Linux allows 65,530.
    """
    scalars = {
        "memory/peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    }  # Linux counts kilobytes here.
    process = Path("/proc/self")
    if (process / "statm").exists():
        pages = int((process / "statm").read_text().split()[1])
        scalars["memory/resident_mb"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        scalars["memory/maps"] = (process / "maps").read_bytes().count(b"\n")
        scalars["memory/open_files"] = len(os.listdir(process / "fd"))
    return scalars


class BatchSize(NamedTuple):
    """Real tokens of a batch of rollouts, without padding."""

    prompt_tokens: int
    response_tokens: int

    def plus(self, other: BatchSize) -> BatchSize:
        return BatchSize(self.prompt_tokens + other.prompt_tokens, self.response_tokens + other.response_tokens)


_ONCE = BatchSize(1, 1)


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
        at(stage)

    @property
    def seconds(self) -> float:
        """Wall-clock so far, that of earlier runs included."""
        return self.earlier + time.monotonic() - self._start

    def speed(self, flops: float, tokens: int) -> dict[str, float]:
        """Generated tokens a second and the share of the devices' peak, of the stages that train, since the last `scalars`."""
        seconds = max(1e-9, sum(seconds for stage, seconds in self._laps.items() if stage in _TRAINING))
        peak = jax.device_count() * peak_flops()
        return {"speed/tokens_per_second": tokens / seconds, "speed/mfu": flops / seconds / peak}

    def scalars(self) -> dict[str, float]:
        """Return `time/<stage>` since the last call, what of it was compiling, and what the process holds.

        A program that is compiled again in the middle of a run has met a new shape or placement: steps become slow.
        """
        laps = {f"time/{stage}": seconds for stage, seconds in self._laps.items()}
        compiling = {"time/compile": _compiling["seconds"], "time/compiled_programs": _compiling["programs"]}
        self._laps.clear()
        _compiling.clear()
        return laps | compiling | {"time/step": sum(laps.values())} | memory_scalars()


class Counters:
    """Tokens and FLOPs of training so far; saved with every checkpoint.

    A forward pass costs 2 FLOPs a token for each of the N parameters that it is multiplied with, and forward plus backward 6;
    attention is left out. Every rollout costs, also one that dynamic sampling discards, and so do documents that the policy
    scores to choose positions; evaluation and preparing a corpus are not training.

    Args:
      matmul_parameters: N.
      passes: how often prompts, and how often responses, run forward before the update: to be sampled, and for rewards that ask
        the policy once more.
      update_forward: forward passes of the update beside the one that is differentiated.
    """

    def __init__(self, matmul_parameters: int, passes: BatchSize = _ONCE, update_forward: int = 0):
        self._n, self._passes, self._update = matmul_parameters, passes, 6.0 + 2.0 * update_forward
        self.generated = 0
        self.discarded = 0
        self.learned = 0
        self.flops = 0.0
        self.discarded_flops = 0.0

    def _rollout_flops(self, prompt_tokens: int, response_tokens: int) -> float:
        tokens = self._passes.prompt_tokens * prompt_tokens + self._passes.response_tokens * response_tokens
        return 2.0 * self._n * tokens

    def count_rollouts(self, size: BatchSize) -> BatchSize:
        """Count prompts that were prefilled once each and their responses; return `size`."""
        self.generated += size.response_tokens
        self.flops += self._rollout_flops(*size)
        return size

    def count_update(
        self, size: BatchSize, learned: int, trunk: int, generated: BatchSize, document_tokens: int = 0
    ) -> None:
        """Count one update.

        Args:
          size: of the batch that was learned from.
          learned: response tokens of it that have a gradient.
          trunk: tokens that the trunk ran over for these; what they share counts once.
          generated: all of this step's rollouts; more than the batch holds where dynamic sampling replaced groups.
          document_tokens: tokens of documents whose cross-entropy was learned beside.
        """
        left = generated.prompt_tokens - size.prompt_tokens, generated.response_tokens - size.response_tokens
        self.discarded += left[1]
        self.discarded_flops += self._rollout_flops(*left)
        self.learned += learned
        self.flops += self._update * self._n * trunk
        self.flops += 6.0 * self._n * document_tokens

    def count_scored(self, tokens: int) -> None:
        """Count documents that ran forward once."""
        self.flops += 2.0 * self._n * tokens

    def scalars(self) -> dict[str, float]:
        return {
            "tokens/generated_total": self.generated,
            "tokens/discarded_total": self.discarded,
            "tokens/learnt_total": self.learned,
            "flops/train_total": self.flops,
            "flops/discarded_total": self.discarded_flops,
        }

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
