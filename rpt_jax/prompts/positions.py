"""Which positions of which documents are worth predicting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.store import Records
from rpt_jax.registry import POSITION_CHOICES

if TYPE_CHECKING:
    from rpt_jax.corpus.entropy import Scores

_BLOCK = 1024  # Records that are read at a time.
STAGES = 8  # Of the easy-to-hard curriculum, each with as many positions.
_EVERY = -0.5  # Below every entropy, and above what stands in place of a special token's.

# Of a window, by its number among the records: its positions' entropies, renormalized and not.
Entropies = Records | Mapping[int, tuple[np.ndarray, ...]]


class Position(NamedTuple):
    """A target: token `position` of document number `document`, given the tokens before it."""

    document: int
    position: int
    entropy: float  # The proxy's, in nats.


def choose_positions(scores: Sequence[Scores], threshold: float, min_context: int) -> list[Position]:
    """Keep positions whose entropy is above `threshold` and that have at least `min_context` tokens before them.

    Paper, section 3.3 (the threshold is not given there); without a minimum context, the first tokens of a document look
    hard only because nothing is known yet.
    """
    chosen = []
    for document, score in enumerate(scores):
        kept = np.flatnonzero(score.entropy_S > threshold)
        chosen += [Position(document, int(i), float(score.entropy_S[i])) for i in kept if i >= min_context]
    return chosen


class Choice(NamedTuple):
    """Positions whose entropy is above `low` and at most `high` nats; of those a random share, where `share` is below 1.

    Positions with fewer than `min_context` tokens before them in their window are never chosen, and so neither are the first
    after a cut; special tokens are not, since their entropy is stored as a negative number.
    """

    low: float
    high: float
    share: float
    min_context: int
    renormalized: bool
    seed: int

    def entropy(self, record: tuple[np.ndarray, ...]) -> np.ndarray:
        return record[0 if self.renormalized else 1]

    def places(self, number: int, entropy_S: np.ndarray) -> np.ndarray:
        """Return the chosen positions of window `number`, in order; a function of the window alone."""
        chosen_S = (entropy_S > self.low) & (entropy_S <= self.high)
        chosen_S[: self.min_context] = False
        if self.share < 1.0:
            chosen_S &= np.random.default_rng((self.seed, number)).random(len(entropy_S)) < self.share
        return np.flatnonzero(chosen_S)


class PositionIndex(Sequence):
    """All positions of a choice, in the order of the documents; in memory are 16 bytes a window. Can be pickled.

    Args:
      numbers_N: the windows' numbers among the records; a `Position.document` is an index into it.
      documents_M: uint32, those of the windows that have positions, in order.
      counts_M: uint32, how many each has.
    """

    def __init__(
        self,
        scores: Entropies,
        numbers_N: np.ndarray,
        choice: Choice,
        documents_M: np.ndarray,
        counts_M: np.ndarray,
    ):
        self._scores, self._numbers_N, self._choice = scores, numbers_N, choice
        self._documents_M, self.counts_M = documents_M, counts_M
        self._first_M = np.concatenate([[0], np.cumsum(counts_M, dtype=np.int64)])

    def only(self, kept_N: np.ndarray) -> PositionIndex:
        """The positions of some of the windows, bool [N]; their numbers do not change."""
        kept_M = kept_N[self._documents_M]
        kept = self._documents_M[kept_M], self.counts_M[kept_M]
        return PositionIndex(self._scores, self._numbers_N, self._choice, *kept)

    def first(self, place: int) -> int:
        """The index of the first position of the window that has `counts_M[place]`."""
        return int(self._first_M[place])

    def __len__(self) -> int:
        return int(self._first_M[-1])

    def __getitem__(self, index: int) -> Position:
        index = range(len(self))[index]
        place = int(np.searchsorted(self._first_M, index, side="right")) - 1
        document = int(self._documents_M[place])
        number = int(self._numbers_N[document])
        entropy_S = self._choice.entropy(self._scores[number])
        position = int(self._choice.places(number, entropy_S)[index - self._first_M[place]])
        return Position(document, position, float(entropy_S[position]))


class EntropyReader:
    """The entropies that a choice of positions may look at: called, it yields those of each window, float32 [S]."""

    def __init__(self, config: DataConfig, scores: Entropies, numbers_M: np.ndarray):
        self._everything = every_position(config)
        self._scores, self._numbers_M = scores, numbers_M

    def __call__(self) -> Iterable[np.ndarray]:
        """Yield the entropies of every window, without the positions that have too little context."""
        everything = self._everything
        for _, record in _read(self._scores, self._numbers_M):
            yield everything.entropy(record)[everything.min_context :]


def every_position(config: DataConfig) -> Choice:
    """The rule that chooses every position with enough context."""
    return Choice(_EVERY, np.inf, 1.0, config.min_context, config.entropy_renormalized, config.seed)


@POSITION_CHOICES.register("threshold")
def above_threshold(config: DataConfig, entropies: EntropyReader) -> list[Choice]:
    """Positions whose entropy is above `data.entropy_threshold` (paper, section 3.3)."""
    del entropies
    return [every_position(config)._replace(low=config.entropy_threshold)]


@POSITION_CHOICES.register("quantile", fields=("keep_fraction",))
def hardest_fraction(config: DataConfig, entropies: EntropyReader) -> list[Choice]:
    """The fraction `data.keep_fraction` of all positions with the highest entropies."""
    [low] = quantiles(entropies, [1.0 - config.keep_fraction], _EVERY)
    return [every_position(config)._replace(low=low)]


@POSITION_CHOICES.register("every")
def all_positions(config: DataConfig, entropies: EntropyReader) -> list[Choice]:
    """Every position."""
    del entropies
    return [every_position(config)]


@POSITION_CHOICES.register("random", fields=("keep_fraction",))
def random_fraction(config: DataConfig, entropies: EntropyReader) -> list[Choice]:
    """A random fraction `data.keep_fraction` of all positions: the baseline without entropies."""
    del entropies
    return [every_position(config)._replace(share=config.keep_fraction)]


@POSITION_CHOICES.register("curriculum")
def easy_to_hard(config: DataConfig, entropies: EntropyReader) -> list[Choice]:
    """Positions above `data.entropy_threshold`, in eight stages of equal size from low to high entropy."""
    above = every_position(config)._replace(low=config.entropy_threshold)
    edges = quantiles(entropies, [i / STAGES for i in range(1, STAGES)], above.low)
    lows, highs = [above.low, *edges], [*edges, np.inf]
    return [above._replace(low=low, high=high) for low, high in zip(lows, highs, strict=True)]


@POSITION_CHOICES.register(
    "self_entropy", fields=("keep_fraction", "rescore_every_steps", "rescore_windows"), rescored=True
)
def hardest_for_the_policy(config: DataConfig, entropies: EntropyReader) -> list[Choice]:
    """The fraction `data.keep_fraction` with the highest entropies under the policy itself, scored again during training."""
    return hardest_fraction(config, entropies)


def index_positions(
    config: DataConfig, scores: Entropies, numbers_N: np.ndarray, documents_M: np.ndarray | None = None
) -> list[PositionIndex]:
    """Find the positions that `data.positions` names in the windows `numbers_N`; reads their entropies, and keeps none.

    Args:
      documents_M: in these of the windows alone; None = in all.

    Returns: one index, or for the curriculum one for each stage, easy ones first.
    """
    documents_M = np.arange(len(numbers_N), dtype=np.uint32) if documents_M is None else documents_M

    read = EntropyReader(config, scores, numbers_N[documents_M])
    choices = POSITION_CHOICES[config.positions].function(config, read)
    counts_CxM = np.zeros((len(choices), len(documents_M)), np.uint32)
    for i, (number, record) in enumerate(_read(scores, numbers_N[documents_M])):
        for c, choice in enumerate(choices):
            counts_CxM[c, i] = len(choice.places(number, choice.entropy(record)))
    return [
        PositionIndex(scores, numbers_N, choice, documents_M[counts_M > 0], counts_M[counts_M > 0])
        for choice, counts_M in zip(choices, counts_CxM, strict=True)
    ]


def _read(scores: Entropies, numbers_M: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Records with their numbers, of which a block is in memory at a time."""
    for first in range(0, len(numbers_M), _BLOCK):
        numbers = numbers_M[first : first + _BLOCK].tolist()
        records = scores.read(numbers) if isinstance(scores, Records) else [scores[number] for number in numbers]
        yield from zip(numbers, records, strict=True)


def quantiles(parts: Callable[[], Iterable[np.ndarray]], shares: Sequence[float], above: float) -> list[float]:
    """Return the least float32 values that at least `shares` of the values greater than `above` do not exceed; exact.

    Args:
      parts: gives all values, in arrays; called twice. They are counted by the upper and then by the lower half of their
        bits, so memory does not grow with them. Values that count must not be negative.
    """

    def bits() -> Iterable[np.ndarray]:
        return (part[part > above].astype(np.float32).view(np.uint32) for part in parts())

    upper = np.zeros(2**16, np.int64)
    for part in bits():
        upper += np.bincount(part >> 16, minlength=2**16)
    below, total, found = np.concatenate([[0], np.cumsum(upper)]), int(upper.sum()), []
    if not total:
        return [float(max(above, 0.0))] * len(shares)
    ranks = [min(total, max(1, int(np.ceil(share * total)))) for share in shares]
    halves = [int(np.searchsorted(below[1:], rank)) for rank in ranks]
    lower = {half: np.zeros(2**16, np.int64) for half in halves}
    for part in bits():
        for half, counts in lower.items():
            counts += np.bincount(part[part >> 16 == half] & 0xFFFF, minlength=2**16)
    for rank, half in zip(ranks, halves, strict=True):
        low = int(np.searchsorted(np.cumsum(lower[half]), rank - below[half]))
        found.append(float(np.array((half << 16) | low, np.uint32).view(np.float32)))
    return found
