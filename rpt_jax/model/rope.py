"""Rotary frequencies, plain and stretched to longer contexts in the three ways of the families that we have."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al., 2306.15595): every position is divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1: waves longer than the original context are slowed by `factor`, short ones are kept, smooth between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., 2309.00071). `attention_factor` multiplies cosines and sines; None is the paper's own."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


Scaling = Linear | Llama3 | Yarn
# The names, of kinds and fields alike, are those of config.json.
SCALINGS: dict[str, type[Scaling]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rope_frequencies(head_size: int, base: float, scaling: Scaling | None) -> tuple[np.ndarray, float]:
    """Return the angle a position of each of the C/2 pairs, float32, and what cosines and sines are multiplied with."""
    frequency = base ** (-np.arange(0, head_size, 2) / head_size)
    factor = 1.0
    match scaling:
        case Linear():
            frequency = frequency / scaling.factor
        case Llama3():
            frequency = frequency / llama3_divisors(frequency, scaling)
        case Yarn():
            frequency = _yarn(frequency, base, scaling)
            factor = scaling.attention_factor
            factor = 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
    return frequency.astype(np.float32), factor


def llama3_divisors(frequency: np.ndarray, s: Llama3) -> np.ndarray:
    """Return what each frequency is divided by, 1 to `factor`."""
    turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / s.factor)


def _yarn(frequency: np.ndarray, base: float, s: Yarn) -> np.ndarray:
    size = 2 * len(frequency)

    def pair_that_turns(times: float) -> float:
        """The pair, as a real number, whose wave turns so often within the original context."""
        return size * math.log(s.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(s.beta_fast), pair_that_turns(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # The small number is the published implementation's, where the ramp has no width.
    interpolated = np.clip((np.arange(len(frequency)) - low) / (high - low or 0.001), 0.0, 1.0)
    return frequency * (interpolated / s.factor + 1.0 - interpolated)
