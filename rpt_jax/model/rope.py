"""Rotary position embedding frequencies, unscaled or scaled for longer contexts."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al., arXiv 2306.15595): divide every position by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Scaling of Llama 3.1 by wavelength.

    Frequencies with a wavelength longer than the original context / `low_freq_factor` are divided by `factor`, those with
    one shorter than the original context / `high_freq_factor` are unchanged, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071).

    Attributes:
      factor: how many times longer the context becomes.
      original_max_position_embeddings: context that the model was pre-trained with, in tokens.
      attention_factor: multiplies cosines and sines; None for the paper's 0.1 · ln(factor) + 1.
      beta_fast: frequencies with more rotations than this within the original context are unchanged.
      beta_slow: frequencies with fewer rotations than this are divided by `factor`; those between are interpolated.
      truncate: whether the ends of the interpolated range are rounded to whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


Scaling = Linear | Llama3 | Yarn
# `rope_type` in config.json -> scaling. The fields are also named as in config.json.
SCALINGS: dict[str, type[Scaling]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rope_frequencies(head_size: int, base: float, scaling: Scaling | None) -> tuple[np.ndarray, float]:
    """Compute the rotary frequencies.

    Args:
      head_size: size C of a query or key vector.
      base: base of the geometric series of frequencies.
      scaling: change for longer contexts, or None.

    Returns: radians per position, float32 [C / 2], and a factor for the cosines and sines.
    """
    frequency = base ** (-np.arange(0, head_size, 2) / head_size)
    factor = 1.0
    match scaling:
        case Linear():
            frequency = frequency / scaling.factor
        case Llama3():
            frequency = frequency / llama3_divisors(frequency, scaling)
        case Yarn():
            frequency = _scale_yarn(frequency, base, scaling)
            if scaling.attention_factor is None:
                factor = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
            else:
                factor = scaling.attention_factor
    return frequency.astype(np.float32), factor


def llama3_divisors(frequency: np.ndarray, scaling: Llama3) -> np.ndarray:
    """Return the divisor of each frequency, [C / 2], between 1 and `scaling.factor`.

    Args:
      frequency: unscaled frequencies, [C / 2], in radians per position.
      scaling: parameters of the scaling.
    """
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    slow = scaling.low_freq_factor
    fast = scaling.high_freq_factor
    unscaled = np.clip((rotations - slow) / (fast - slow), 0.0, 1.0)
    return 1.0 / (unscaled + (1.0 - unscaled) / scaling.factor)


def _scale_yarn(frequency: np.ndarray, base: float, scaling: Yarn) -> np.ndarray:
    """Return the frequencies scaled by YaRN, [C / 2]."""
    size = 2 * len(frequency)

    def index_with_rotations(rotations: float) -> float:
        """Return the (fractional) index of the frequency with this many rotations within the original context."""
        context = scaling.original_max_position_embeddings
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = index_with_rotations(scaling.beta_fast)
    high = index_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    # 0.001 is the published implementation's width for an empty range.
    interpolated = np.clip((np.arange(len(frequency)) - low) / (high - low or 0.001), 0.0, 1.0)
    return frequency * (interpolated / scaling.factor + 1.0 - interpolated)
