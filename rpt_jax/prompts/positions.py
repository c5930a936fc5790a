"""Target positions: the rules that choose which tokens of the corpus the policy is trained to predict.

A position is a token to predict or, where targets are segments (`prompts.targets`), the first token of one.

A choice of positions is a function that is registered by the name that `data.positions` gives it. It returns one rule for each
stage of training, most choices a single one:

    @POSITION_CHOICES.register("above_two_nats")
    def above_two_nats(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
        return [dataclasses.replace(every_position(config), low=2.0)]

A rule may be an instance of any class that has the methods of `PositionRule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.store import Records
from rpt_jax.prompts.targets import Segments
from rpt_jax.registry import POSITION_CHOICES

CURRICULUM_STAGES = 8  # Stages of the easy-to-hard curriculum, each with the same number of positions.
_RECORDS_PER_READ = 1024
_SIGN = 1 << 31  # Sign bit of a float32.
_NOT_A_POSITION = -1.0  # In place of the entropy of a token that cannot be predicted; also stored for special tokens.
_BELOW_ALL = -0.5  # Nats: below every entropy, and above `_NOT_A_POSITION`.


class Position(NamedTuple):
    """A token to predict, given the tokens of its window before it, or the first one of a segment.

    Attributes:
      window: index of the window.
      position: index of the token in the window.
      entropy: entropy of the next-token distribution at this position, or its mean over the segment, in nats.
    """

    window: int
    position: int
    entropy: float


def choose_positions(
    windows: Sequence[Sequence[int]],
    entropies: Sequence[np.ndarray],
    boxable_V: np.ndarray,
    threshold: float,
    min_context: int,
    segments: Segments | None = None,
) -> tuple[list[Position], int]:
    """Return the positions whose entropy is above a threshold and whose token a box can hold, and the number of the others.

    Args:
      windows: token ids of each window.
      entropies: of each window, float32 [S], in nats.
      boxable_V: bool, the tokens that a box can hold.
      threshold: in nats.
      min_context: positions with fewer tokens before them are left out, because almost every token is hard to predict without
        context.
      segments: finds the segments of a window, if they are the targets.

    Returns: the positions, and how many are left out only because no box can hold their token. Of segments, all that cannot be
      targets are counted.
    """
    chosen = []
    left_out = 0
    for window, (ids, entropy_S) in enumerate(zip(windows, entropies, strict=True)):
        target_S = target_entropies(entropy_S, ids, boxable_V, segments)
        chosen_S = target_S > threshold
        chosen_S[:min_context] = False
        chosen += [
            Position(window=window, position=int(i), entropy=float(target_S[i])) for i in np.flatnonzero(chosen_S)
        ]
        if segments:
            left_out += segments.count_left_out(ids, min_context).total()
        else:
            left_out += int((entropy_S[min_context:] > threshold).sum() - chosen_S.sum())
    return chosen, left_out


def target_entropies(
    entropy_S: np.ndarray, ids_S: Sequence[int] | np.ndarray, boxable_V: np.ndarray, segments: Segments | None
) -> np.ndarray:
    """Return the entropy of the target that begins at each token of a window, float32 [S], in nats; -1 where none begins.

    Args:
      entropy_S: of the next-token distributions.
      ids_S: token ids of the window.
      boxable_V: bool, the tokens that a box can hold, which are the targets if `segments` is None.
      segments: finds the segments of a window. Their entropy is the mean over their tokens.
    """
    if segments is None:
        return np.where(boxable_V[ids_S], entropy_S, np.float32(_NOT_A_POSITION))
    ends_S = segments.ends(ids_S)
    starts_N = np.flatnonzero(ends_S)
    sums = np.concatenate([[0.0], np.cumsum(entropy_S, dtype=np.float64)])
    target_S = np.full(len(ends_S), _NOT_A_POSITION, np.float32)
    target_S[starts_N] = (sums[ends_S[starts_N]] - sums[starts_N]) / (ends_S[starts_N] - starts_N)
    return target_S


# Entropies of the positions of a window by the number of its record: (renormalized, not renormalized), float32 [S] each.
StoredEntropies = Records | Mapping[int, tuple[np.ndarray, ...]]


class Entropies:
    """Entropies of targets by the number of a record, without those of tokens that no box can hold. Picklable."""

    def __init__(
        self, stored: StoredEntropies, tokens: Records, boxable_V: np.ndarray, segments: Segments | None = None
    ):
        """
        Args:
          stored: entropies as a prepared corpus has them.
          tokens: token ids, with the same numbers.
          boxable_V: bool, the tokens that a box can hold.
          segments: finds the segments of a window, if they are the targets.
        """
        self._stored = stored
        self._tokens = tokens
        self._boxable_V = boxable_V
        self._segments = segments

    def read(self, numbers: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
        """Return both entropies of each record, float32 [S] each; -1 where no target begins."""
        stored = self._stored
        found = stored.read(numbers) if isinstance(stored, Records) else [stored[number] for number in numbers]
        tokens = self._tokens.read(numbers)
        return [
            tuple(target_entropies(entropy_S, ids, self._boxable_V, self._segments) for entropy_S in record)
            for record, (ids, _) in zip(found, tokens, strict=True)
        ]

    def count_left_out(self, numbers: np.ndarray, min_context: int) -> int:
        """Return the number of tokens that no box can hold, with at least `min_context` tokens of their window before them."""
        return sum(int((~self._boxable_V[ids[min_context:]]).sum()) for ids, _ in read_in_blocks(self._tokens, numbers))


class PositionRule(Protocol):
    """Chooses positions of a window. Must be picklable, for worker processes."""

    def entropy(self, record: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the entropies that positions are chosen by and that prompts report, float32 [S], in nats.

        Args:
          record: the stored entropies of the window, renormalized and not renormalized.
        """
        ...

    def positions(self, record_number: int, entropy_S: np.ndarray) -> np.ndarray:
        """Return the chosen positions of a window in ascending order, int [n].

        The result must be a function of the arguments: it is computed again for every prompt.

        Args:
          record_number: the number of the window's record in the corpus.
          entropy_S: what `entropy` returned; negative at tokens that no box can hold, which must not be chosen.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyRule:
    """Chooses positions with an entropy in (low, high] nats, or a random fraction of them.

    Tokens that no box can hold are never chosen, because they have a negative number in place of their entropy.

    Attributes:
      low, high: bounds of the entropy, in nats.
      fraction: fraction of these positions that is chosen at random.
      min_context: positions with fewer tokens of their window before them are not chosen.
      renormalized: whether the entropy is renormalized over the top-k tokens.
      seed: of the random choice.
    """

    low: float
    high: float = np.inf
    fraction: float = 1.0
    min_context: int
    renormalized: bool
    seed: int

    def entropy(self, record: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the renormalized or the plain entropies of a window, float32 [S]."""
        return record[0 if self.renormalized else 1]

    def positions(self, record_number: int, entropy_S: np.ndarray) -> np.ndarray:
        """Return the chosen positions of a window in ascending order."""
        chosen_S = (entropy_S > self.low) & (entropy_S <= self.high)
        chosen_S[: self.min_context] = False
        if self.fraction < 1.0:
            rng = np.random.default_rng((self.seed, record_number))
            chosen_S &= rng.random(len(entropy_S)) < self.fraction
        return np.flatnonzero(chosen_S)


class PositionIndex(Sequence):
    """All positions that a rule chooses, in the order of the windows.

    Positions are computed when they are read: only 16 bytes a window are in memory. Picklable.
    """

    def __init__(
        self,
        entropies: Entropies,
        record_numbers_W: np.ndarray,
        rule: PositionRule,
        windows_M: np.ndarray,
        counts_M: np.ndarray,
    ):
        """
        Args:
          entropies: by record number.
          record_numbers_W: the record number of each window; `Position.window` is an index into it.
          rule: chooses the positions of a window.
          windows_M: uint32, the windows that have positions, in ascending order.
          counts_M: uint32, the number of positions of each of these windows.
        """
        self._entropies = entropies
        self._record_numbers_W = record_numbers_W
        self._rule = rule
        self._windows_M = windows_M
        self.counts_M = counts_M
        self._first_index_M = np.concatenate([[0], np.cumsum(counts_M, dtype=np.int64)])

    def restrict_to(self, kept_W: np.ndarray) -> PositionIndex:
        """Return the index of the positions in some of the windows, bool [W]; windows keep their numbers."""
        kept_M = kept_W[self._windows_M]
        return PositionIndex(
            entropies=self._entropies,
            record_numbers_W=self._record_numbers_W,
            rule=self._rule,
            windows_M=self._windows_M[kept_M],
            counts_M=self.counts_M[kept_M],
        )

    def first_index(self, m: int) -> int:
        """Return the index of the first position of the window that `counts_M[m]` belongs to."""
        return int(self._first_index_M[m])

    def __len__(self) -> int:
        return int(self._first_index_M[-1])

    def __getitem__(self, index: int) -> Position:
        index = range(len(self))[index]
        m = int(np.searchsorted(self._first_index_M, index, side="right")) - 1
        window = int(self._windows_M[m])
        record_number = int(self._record_numbers_W[window])
        [record] = self._entropies.read([record_number])
        entropy_S = self._rule.entropy(record)
        position = int(self._rule.positions(record_number, entropy_S)[index - self._first_index_M[m]])
        return Position(window=window, position=position, entropy=float(entropy_S[position]))


class EntropyReader:
    """Reads the entropies of all positions with enough context, for choices that depend on their distribution.

    Every call returns a new iterator over the windows, float32 [S] each. Tokens that no box can hold are included, as negative
    numbers.
    """

    def __init__(self, config: DataConfig, entropies: Entropies, record_numbers_M: np.ndarray):
        self._rule = every_position(config)
        self._entropies = entropies
        self._record_numbers_M = record_numbers_M

    def __call__(self) -> Iterator[np.ndarray]:
        for record in read_in_blocks(self._entropies, self._record_numbers_M):
            yield self._rule.entropy(record)[self._rule.min_context :]


def every_position(config: DataConfig) -> EntropyRule:
    """Return the rule that chooses every position with at least `data.min_context` tokens before it."""
    return EntropyRule(
        low=_BELOW_ALL,
        min_context=config.min_context,
        renormalized=config.entropy_renormalized,
        seed=config.seed,
    )


@POSITION_CHOICES.register("threshold", fields=("entropy_threshold",), reported_fields=("entropy_threshold",))
def above_threshold(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """Positions whose entropy is above `data.entropy_threshold` (paper, section 3.3)."""
    del entropies
    return [dataclasses.replace(every_position(config), low=config.entropy_threshold)]


@POSITION_CHOICES.register("quantile", fields=("keep_fraction",), reported_fields=("keep_fraction",))
def hardest_fraction(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """The fraction `data.keep_fraction` of all positions with the highest entropies."""
    if config.keep_fraction == 1.0:
        return [every_position(config)]  # Also those with the lowest entropy, which is the quantile itself.
    [low] = quantiles(entropies, [1.0 - config.keep_fraction], _BELOW_ALL)
    return [dataclasses.replace(every_position(config), low=low)]


@POSITION_CHOICES.register("every", scored=False)
def all_positions(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """Every position."""
    del entropies
    return [every_position(config)]


@POSITION_CHOICES.register("random", scored=False, fields=("keep_fraction",), reported_fields=("keep_fraction",))
def random_fraction(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """A random fraction `data.keep_fraction` of all positions: the baseline that ignores entropies."""
    del entropies
    return [dataclasses.replace(every_position(config), fraction=config.keep_fraction)]


@POSITION_CHOICES.register(
    "curriculum", staged=True, fields=("entropy_threshold",), reported_fields=("entropy_threshold",)
)
def easy_to_hard(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """Positions above `data.entropy_threshold`, in eight stages of equal size from low to high entropy."""
    above = dataclasses.replace(every_position(config), low=config.entropy_threshold)
    edges = quantiles(entropies, [i / CURRICULUM_STAGES for i in range(1, CURRICULUM_STAGES)], above.low)
    lows = [above.low, *edges]
    highs = [*edges, np.inf]
    return [dataclasses.replace(above, low=low, high=high) for low, high in zip(lows, highs, strict=True)]


@POSITION_CHOICES.register(
    "self_entropy",
    fields=("keep_fraction", "rescore_every_steps", "rescore_windows"),
    reported_fields=("keep_fraction",),
    rescored=True,
)
def hardest_for_the_policy(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """The fraction `data.keep_fraction` with the highest entropies under the current policy, scored again during training."""
    return hardest_fraction(config, entropies)


def index_positions(
    config: DataConfig, entropies: Entropies, record_numbers_W: np.ndarray, windows_M: np.ndarray | None = None
) -> list[PositionIndex]:
    """Apply the choice of `data.positions` to windows.

    Entropies are read in blocks and not kept.

    Args:
      config: names the choice.
      entropies: by record number.
      record_numbers_W: the record number of each window.
      windows_M: the windows to choose from, indices into `record_numbers_W`; None = all.

    Returns: one index for each rule of the choice: for the curriculum one a stage, easy ones first, otherwise a single one.
    """
    if windows_M is None:
        windows_M = np.arange(len(record_numbers_W), dtype=np.uint32)
    record_numbers_M = record_numbers_W[windows_M]
    reader = EntropyReader(config, entropies, record_numbers_M)
    rules: list[PositionRule] = POSITION_CHOICES[config.positions].function(config, reader)

    # Count the positions of every window.
    counts_RxM = np.zeros((len(rules), len(windows_M)), np.uint32)
    for m, record in enumerate(read_in_blocks(entropies, record_numbers_M)):
        for r, rule in enumerate(rules):
            counts_RxM[r, m] = len(rule.positions(int(record_numbers_M[m]), rule.entropy(record)))
    return [
        PositionIndex(
            entropies=entropies,
            record_numbers_W=record_numbers_W,
            rule=rule,
            windows_M=windows_M[counts_M > 0],
            counts_M=counts_M[counts_M > 0],
        )
        for rule, counts_M in zip(rules, counts_RxM, strict=True)
    ]


def read_in_blocks(
    source: Entropies | Records, numbers: Sequence[int] | np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the records with the given numbers, read in blocks to bound memory."""
    for first in range(0, len(numbers), _RECORDS_PER_READ):
        yield from source.read([int(number) for number in numbers[first : first + _RECORDS_PER_READ]])


def quantiles(read_values: Callable[[], Iterable[np.ndarray]], fractions: Sequence[float], above: float) -> list[float]:
    """Return exact quantiles of the float32 values greater than `above`, in bounded memory.

    The quantile of a fraction is the smallest value that at least this fraction of the values does not exceed. Values are
    counted in two passes, by the upper and then by the lower 16 bits of an integer that orders as they do.

    Args:
      read_values: returns all values in arrays of any length; called twice.
      fractions: in [0, 1].
      above: values up to this one do not count.

    Returns: one value for each fraction; max(above, 0) if there are no values.
    """

    def read_keys() -> Iterator[np.ndarray]:
        for values in read_values():
            yield _ordered_bits(values[values > above])

    # First pass: a histogram over the upper halves shows in which of them each quantile lies.
    upper_counts = np.zeros(2**16, np.int64)
    for keys in read_keys():
        upper_counts += np.bincount(keys >> 16, minlength=2**16)
    total = int(upper_counts.sum())
    if not total:
        return [float(max(above, 0.0))] * len(fractions)
    cumulative = np.concatenate([[0], np.cumsum(upper_counts)])
    ranks = [min(total, max(1, int(np.ceil(fraction * total)))) for fraction in fractions]
    uppers = [int(np.searchsorted(cumulative[1:], rank)) for rank in ranks]

    # Second pass: histograms over the lower halves of the values in these ranges.
    lower_counts = {upper: np.zeros(2**16, np.int64) for upper in uppers}
    for keys in read_keys():
        for upper, counts in lower_counts.items():
            counts += np.bincount(keys[keys >> 16 == upper] & 0xFFFF, minlength=2**16)

    found = []
    for rank, upper in zip(ranks, uppers, strict=True):
        lower = int(np.searchsorted(np.cumsum(lower_counts[upper]), rank - cumulative[upper]))
        found.append(_from_ordered_bits((upper << 16) | lower))
    return found


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """Return uint32 keys that order as the float32 values do, with both zeros equal.

    The bits of a non-negative float order as unsigned integers do, those of a negative one in reverse.
    """
    bits = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)  # The sum turns -0.0 into 0.0.
    return np.where(bits >> 31, ~bits, bits | _SIGN)


def _from_ordered_bits(key: int) -> float:
    """Return the value whose key `_ordered_bits` returns."""
    bits = key ^ _SIGN if key & _SIGN else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))
