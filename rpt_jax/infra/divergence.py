"""Rules that detect a diverging run: reward collapse, entropy collapse, and mismatch between sampler and trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpt_jax.config import DivergenceConfig

_METRICS = ("reward/drawn_mean", "policy/entropy", "mismatch/mean")


class Diverged(Exception):
    """A rule was broken, and `divergence.action` is "stop"."""


class DivergenceMonitor:
    """Compares means over the last `divergence.window` steps with the rules, once that many steps are available.

    A broken rule is reported once, and again after it was kept in between.

    Attributes:
      recent: the last values of each metric.
      best_reward: the largest mean reward so far.
      broken: metrics whose rule is broken now.
    """

    def __init__(self, config: DivergenceConfig):
        self._config = config
        self.recent: dict[str, list[float]] = {}
        self.best_reward = 0.0
        self.broken: list[str] = []

    def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
        """Add the metrics of a step; return a sentence for each rule that is newly broken.

        Raises:
          Diverged: a rule is newly broken, and `divergence.action` is "stop".
        """
        # Update the means, which exist once the window is full.
        config = self._config
        for metric in _METRICS:
            self.recent[metric] = [*self.recent.get(metric, []), float(scalars[metric])][-config.window :]
        if len(self.recent["reward/drawn_mean"]) < config.window:
            return []

        means = {metric: sum(self.recent[metric]) / config.window for metric in _METRICS}
        reward = means["reward/drawn_mean"]
        entropy = means["policy/entropy"]
        mismatch = means["mismatch/mean"]

        # Apply the rules.
        self.best_reward = max(self.best_reward, reward)
        reward_floor = config.reward_collapse * self.best_reward
        problems: dict[str, str] = {}
        if reward < reward_floor:
            problems["reward/drawn_mean"] = (
                f"reward/drawn_mean {reward:.4g} < {reward_floor:.4g}, divergence.reward_collapse of its best "
                f"{self.best_reward:.4g}"
            )
        if entropy < config.entropy_floor:
            problems["policy/entropy"] = (
                f"policy/entropy {entropy:.4g} < divergence.entropy_floor={config.entropy_floor:g}"
            )
        if 0 < config.mismatch_ceiling < mismatch:
            problems["mismatch/mean"] = (
                f"mismatch/mean {mismatch:.4g} > divergence.mismatch_ceiling={config.mismatch_ceiling:g}"
            )

        # Report only rules that were kept in the step before.
        new = [
            f"step {step}, mean of {config.window} steps: {problem}"
            for metric, problem in problems.items()
            if metric not in self.broken
        ]
        self.broken = list(problems)
        if new and config.action == "stop":
            raise Diverged("; ".join(new))
        return new

    def state(self) -> dict[str, Any]:
        """Return the monitor's state as JSON values, for `restore`."""
        return {"recent": self.recent, "best_reward": self.best_reward, "broken": self.broken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.recent = dict(state["recent"])
        self.best_reward = state["best_reward"]
        self.broken = list(state["broken"])
