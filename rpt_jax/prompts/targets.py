r"""Targets: what a prediction is compared with, the next token or a segment of the text.

A kind of targets is a function that is registered by the name that `data.targets` gives it. It returns None for next tokens, or
the `Segments` of a window, which begin and end between tokens:

    @TARGETS.register("line")
    def line(experiment: Experiment, tokenizer: Tokenizer) -> Segments:
        return Segments(functools.partial(line_spans, pieces=tokenizer.pieces), tokenizer, experiment.prompt, max_tokens=64)
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from rpt_jax.config import Experiment, PromptConfig
from rpt_jax.errors import UserError, check_choice
from rpt_jax.prompts.response_format import BOX
from rpt_jax.questions.text import last_box
from rpt_jax.registry import TARGETS
from rpt_jax.tokenizers.tokenizer import END_THINK, Tokenizer

# Returns the first token of each segment of a window, and the token after its last one, int [N] each, in ascending order. If the
# window cuts a segment, its end is a token after the window.
SpansFn = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

_BOX = BOX.encode()
_END_THINK = END_THINK.encode()
# Bytes without which a text cannot be misread in a box.
_READ_BYTES = frozenset(b"\\{}<")

# A period after one of these words, or after a single letter, as in "e.g." or "J. Smith", does not end a sentence.
_ABBREVIATIONS = ("Mr", "Ms", "Mrs", "Dr", "Prof", "St", "vs", "cf", "Fig", "fig", "Eq", "eq", "al")
_NOT_ABBREVIATED = "".join(rf"(?<!\b{word}\.)" for word in (*_ABBREVIATIONS, "[A-Za-z]"))
# A sentence ends after ".", "!" or "?" and closing quotes or brackets, if the window ends there, or white space without a
# lower-case letter after it follows; after "。", "！" or "？"; and before an empty line.
_SENTENCE_END = re.compile(
    (
        rf"""(?:\.{_NOT_ABBREVIATED}|[!?])[.!?]*(?:["')\]]|\xe2\x80[\x99\x9d])*(?=\s++(?![a-z])|\Z)"""
        r"|(?:\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)"
        r"|(?=\n[ \t\r]*\n)"
    ).encode()
)


@dataclasses.dataclass(frozen=True)
class SegmentOptions:
    """Settings of segments."""

    # What a target is: "sentence", or "tokens" for the next tokens at any position.
    unit: str = "sentence"
    # Tokens of a target: the exact number with unit "tokens", the maximum with "sentence"; longer sentences are left out.
    tokens: int = 32
    # Tokens of the text after the target that the prompt shows too, at most (masked middle); 0 for none.
    right_context: int = 0

    def __post_init__(self) -> None:
        check_choice("data.target_options.unit", self.unit, ("sentence", "tokens"))
        for name, least in (("tokens", 1), ("right_context", 0)):
            value = getattr(self, name)
            if value < least:
                field = f"data.target_options.{name}"
                raise UserError(f"{field}={value} must be at least {least}.", field=field)


class Segments:
    """The segments of a window that can be targets. Picklable, if its function is.

    Attributes:
      right_context: tokens after a target that its prompt shows, at most.
    """

    def __init__(
        self,
        spans: SpansFn,
        tokenizer: Tokenizer,
        prompt: PromptConfig,
        *,
        max_tokens: int,
        right_context: int = 0,
    ):
        """
        Args:
          spans: finds the segments of a window.
          tokenizer: gives the bytes of tokens.
          prompt: `box_reading` and `reference_bytes` are read.
          max_tokens: longer segments are left out.
          right_context: tokens after a target that its prompt shows, at most; 0 for none.
        """
        self.right_context = right_context
        self._spans = spans
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._pieces = tokenizer.pieces
        self._lengths_V = tokenizer.byte_vocab.lengths_V
        self._has_content_V = np.array([bool(piece.strip()) for piece in self._pieces])
        self._may_be_misread_V = np.array([not _READ_BYTES.isdisjoint(piece) for piece in self._pieces])

    def ends(self, ids_S: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the token after the target that begins at each token of a window, int [S]; 0 where none begins."""
        starts_N, ends_N, reason_N = self._judge(ids_S)
        is_target_N = reason_N == ""
        ends_S = np.zeros(len(ids_S), np.int64)
        ends_S[starts_N[is_target_N]] = ends_N[is_target_N]
        return ends_S

    def count_left_out(self, ids_S: Sequence[int] | np.ndarray, min_context: int) -> collections.Counter[str]:
        """Return how many segments with `min_context` tokens before them cannot be targets, by the reason."""
        starts_N, _, reason_N = self._judge(ids_S)
        return collections.Counter(reason_N[(starts_N >= min_context) & (reason_N != "")].tolist())

    def _judge(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the start and the end of each segment, and why it cannot be a target, "" if it can, [N] each."""
        ids_S = np.asarray(ids, np.int64)
        starts_N, uncut_ends_N = self._spans(ids_S)
        ends_N = np.minimum(uncut_ends_N, len(ids_S))

        def total(values_S: np.ndarray) -> np.ndarray:
            sums = np.concatenate([[0], np.cumsum(values_S, dtype=np.int64)])
            return sums[ends_N] - sums[starts_N]

        lengths_S = self._lengths_V[ids_S]
        # The first reason that applies is the one that counts.
        reasons = {
            "cut by the end of the window": uncut_ends_N > len(ids_S),
            "without right context": (ends_N == len(ids_S)) & (self.right_context > 0),
            "with a special token": total(lengths_S == 0) > 0,
            "white space only": total(self._has_content_V[ids_S]) == 0,
            f"of more than {self._max_tokens} tokens": ends_N - starts_N > self._max_tokens,
            "of more than prompt.reference_bytes": total(lengths_S) > self._prompt.reference_bytes,
        }
        reason_N = np.select(list(reasons.values()), list(reasons), "").astype(object)
        for n in np.flatnonzero((reason_N == "") & (total(self._may_be_misread_V[ids_S]) > 0)):
            text = b"".join(self._pieces[i] for i in ids_S[starts_N[n] : ends_N[n]])
            if not can_be_boxed(text, self._prompt.box_reading):
                reason_N[n] = "that no box can hold"
        return starts_N, ends_N, reason_N


def can_be_boxed(text: bytes, reading: str) -> bool:
    """Return whether a box around a text is read as the text, with the reading "balanced" or "to_end" of `rewards.boxed`."""
    if _BOX in text or _END_THINK in text:
        return False
    return reading == "to_end" or last_box(_BOX + text + b"}") == text


def find_segments(experiment: Experiment, tokenizer: Tokenizer) -> Segments | None:
    """Return the segments that `data.targets` names; None if targets are next tokens, or prompts are no positions of a text."""
    if not experiment.samples or experiment.asks_questions:
        return None
    return TARGETS[experiment.data.targets].function(experiment, tokenizer)


@TARGETS.register("token", segments=False)
def token(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """The next token; a prediction of more of the text is right too (paper, Equation 3)."""
    del experiment, tokenizer


@TARGETS.register("segment", options=SegmentOptions)
def segment(experiment: Experiment, tokenizer: Tokenizer) -> Segments:
    """The next sentence or the next k tokens, optionally with right context (RLPT, 2509.19249).

    RLPT predicts the next sentence from those before it (ASR), or a masked one from those before it and the one after it (MSR). A
    generative judge tells it whether a prediction is a valid prefix of the sentence. Here bytes are compared by a rule, or a
    verifier of questions decides, and the right context is a number of tokens. RLPT splits text with NLTK, which needs downloaded
    data; see `sentence_spans` for the rule here.
    """
    options = experiment.data.target_options or SegmentOptions()
    spans = {
        "sentence": functools.partial(sentence_spans, pieces=tokenizer.pieces),
        "tokens": functools.partial(token_spans, tokens=options.tokens),
    }[options.unit]
    return Segments(spans, tokenizer, experiment.prompt, max_tokens=options.tokens, right_context=options.right_context)


def token_spans(ids_S: np.ndarray, *, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the next `tokens` tokens at every token of a window (next-chunk prediction, 2608.23256), as a `SpansFn`."""
    starts_S = np.arange(len(ids_S))
    return starts_S, starts_S + tokens


def sentence_spans(ids_S: np.ndarray, *, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sentences of a window, as a `SpansFn`.

    `_SENTENCE_END` says where a sentence ends. If that is inside a token, the sentence goes on to the token's end. White space
    between sentences belongs to none of them. Text after the last end is a sentence that the window cuts.
    """
    tokens = [pieces[i] for i in ids_S.tolist()]
    # The token after each end, from the number of bytes up to each token's end.
    byte_ends_S = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    found = [match.end() for match in _SENTENCE_END.finditer(b"".join(tokens))]
    found_C = np.searchsorted(byte_ends_S, found) + 1
    cuts = np.unique([0, *found_C, len(tokens)])

    # Leave white space out: move each start to the first token with content, and each end to the last one.
    with_content_C = np.flatnonzero([bool(not token or token.strip()) for token in tokens])
    first_N = np.searchsorted(with_content_C, cuts[:-1])
    last_N = np.searchsorted(with_content_C, cuts[1:]) - 1
    is_sentence_N = first_N <= last_N
    starts_N = with_content_C[first_N[is_sentence_N]]
    ends_N = with_content_C[last_N[is_sentence_N]] + 1
    if len(ends_N) and ends_N[-1] not in found_C:
        ends_N[-1] = len(tokens) + 1
    return starts_N, ends_N
