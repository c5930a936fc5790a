"""Rules that notice a run going wrong: the reward collapses, the entropy is gone, sampler and trainer disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpt_jax.config import DivergenceConfig


class Diverged(Exception):
    """A rule of section divergence was broken, and it says to stop. `main` exits with code 4."""


class DivergenceMonitor:
    """Holds the mean of the last `divergence.window` steps against the rules; says nothing before there are so many.

    A rule that is broken warns once, and again after it has been kept in between.
    """

    def __init__(self, config: DivergenceConfig):
        self._config = config
        self.recent: dict[str, list[float]] = {}
        self.best_reward = 0.0
        self.broken: list[str] = []

    def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
        """Return a sentence for every rule that is newly broken. Raises: Diverged, where these are to stop the run."""
        means = {}
        for name in ("reward/mean", "policy/entropy", "mismatch/mean"):
            self.recent[name] = [*self.recent.get(name, []), float(scalars[name])][-self._config.window :]
            means[name] = sum(self.recent[name]) / self._config.window
        if len(self.recent["reward/mean"]) < self._config.window:
            return []
        reward, entropy, mismatch = means.values()
        self.best_reward = max(self.best_reward, reward)
        floor = self._config.reward_collapse * self.best_reward
        rules = {
            f"reward/mean {reward:.4g} < {floor:.4g}, divergence.reward_collapse of its best {self.best_reward:.4g}": (
                reward < floor
            ),
            f"policy/entropy {entropy:.4g} < divergence.entropy_floor={self._config.entropy_floor:g}": entropy
            < self._config.entropy_floor,
            f"mismatch/mean {mismatch:.4g} > divergence.mismatch_ceiling={self._config.mismatch_ceiling:g}": (
                0 < self._config.mismatch_ceiling < mismatch
            ),
        }
        said = {
            text.split()[0]: f"step {step}, mean of {self._config.window} steps: {text}"
            for text, bad in rules.items()
            if bad
        }
        new = [text for metric, text in said.items() if metric not in self.broken]
        self.broken = [*said]
        if new and self._config.action == "stop":
            raise Diverged("; ".join(new))
        return new

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
