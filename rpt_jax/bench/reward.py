"""Seconds of the prefix-matching reward and of a plain Python implementation, and their fraction of a training step.

The responses are random tokens of a vocabulary like Qwen2.5's, with an end of thinking near the end and a box after
it. The Python implementation reads --python responses, and its time is extrapolated to all of them. The time of a
step is a lower bound: 8 FLOPs per token and parameter of --preset at the rate of one large matrix product.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import numpy as np

from rpt_jax.bench.measure import interleaved, matmul_call, round_to_4_digits
from rpt_jax.bench.options import at_least, positive
from rpt_jax.model.model_config import preset
from rpt_jax.rewards.prefix_match import prefix_match_reward

# Token ids of the made-up vocabulary; all others are random text.
_END_OF_THINKING, _STOP, _BOX, _CLOSING_BRACE = range(4)
_FIRST_TEXT_ID = 4
_LONGEST_TOKEN_BYTES = 128
_ANSWER_TOKENS = 48  # Tokens after the end of thinking.


class Responses(NamedTuple):
    """Random responses, one to each of P prompts, with their true continuations and the vocabulary.

    Attributes:
      tokens_PxGxT: int32, G = 1.
      lengths_PxG: int32.
      stopped_PxG: bool.
      reference_PxR: uint8 bytes of the true continuations.
      boundaries_PxRp1: bool, ends of the continuations' tokens.
      vocab_bytes_VxX: uint8.
      vocab_lengths_V: int32.
      pieces: bytes of every token.
    """

    tokens_PxGxT: np.ndarray
    lengths_PxG: np.ndarray
    stopped_PxG: np.ndarray
    reference_PxR: np.ndarray
    boundaries_PxRp1: np.ndarray
    vocab_bytes_VxX: np.ndarray
    vocab_lengths_V: np.ndarray
    pieces: list[bytes]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--responses", type=positive, default=2048)
    parser.add_argument("--length", type=at_least(_ANSWER_TOKENS), default=8192, help="tokens per response")
    parser.add_argument("--vocab", type=at_least(_FIRST_TEXT_ID + 1), default=152_064)
    parser.add_argument("--python", type=positive, default=64, help="responses that the Python implementation reads")
    parser.add_argument("--preset", default="qwen2.5-14b", help="policy whose training step is compared")
    parser.add_argument("--repeats", type=positive, default=5)


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table.

    Raises:
      UserError: the preset is unknown.
    """
    # The responses, on the devices and as Python values.
    config = preset(options.preset, field="--preset")
    count = min(options.python, options.responses)
    responses = make_responses(options.responses, options.length, options.vocab)
    arrays = responses._asdict()
    pieces = arrays.pop("pieces")
    on_device = jax.device_put(arrays)
    rows = responses.tokens_PxGxT[:count, 0].tolist()
    sizes = [int(np.flatnonzero(boundaries)[0]) for boundaries in responses.boundaries_PxRp1[:count]]
    truths = [responses.reference_PxR[i, :size].tobytes() for i, size in enumerate(sizes)]

    def kernel() -> tuple[jax.Array, jax.Array]:
        return prefix_match_reward(**on_device, end_think_id=_END_OF_THINKING)

    def python() -> list[float]:
        return [python_reward(row, pieces, truth) for row, truth in zip(rows, truths, strict=True)]

    # Both must give the same rewards before their times are compared.
    if np.asarray(kernel()[0])[:count, 0].tolist() != python():
        raise AssertionError("The kernel and the Python implementation give different rewards.")
    matmul, matmul_flops = matmul_call("float32" if jax.default_backend() == "cpu" else "bfloat16")
    seconds = interleaved({"kernel": kernel, "Python": python, "matmul": matmul}, options.repeats)

    # Compare with the time of a training step.
    kernel_seconds = seconds["kernel"].median
    python_seconds = seconds["Python"].median * options.responses / count
    step_flops = 8.0 * config.matmul_parameters * options.responses * options.length
    step_seconds = step_flops / (matmul_flops / seconds["matmul"].fastest)
    python_label = "Python" if count == options.responses else f"Python, extrapolated from {count} responses"
    table = [
        ["kernel", kernel_seconds, python_seconds / kernel_seconds, kernel_seconds / step_seconds],
        [python_label, python_seconds, 1.0, python_seconds / step_seconds],
    ]
    rounded = [[name, *map(round_to_4_digits, figures)] for name, *figures in table]
    return ["reward", "seconds", "speedup over Python", f"fraction of a step of {options.preset}"], rounded


def make_responses(responses: int, length: int, vocab: int) -> Responses:
    """Return random responses, of which about half predict the first token of the true continuation."""
    rng = np.random.default_rng(0)
    # The vocabulary: short random words, and one token of the greatest length.
    sizes = np.minimum(1 + rng.geometric(0.25, vocab), 16)
    sizes[-1] = _LONGEST_TOKEN_BYTES
    letters = rng.integers(ord("a"), ord("z") + 1, (vocab, _LONGEST_TOKEN_BYTES)).astype(np.uint8)
    words = zip(letters[_FIRST_TEXT_ID:], sizes[_FIRST_TEXT_ID:], strict=True)
    pieces = [b"", b"", b"\\boxed{", b"}", *(row[:size].tobytes() for row, size in words)]
    vocab_bytes = np.zeros((vocab, _LONGEST_TOKEN_BYTES), np.uint8)
    for i, piece in enumerate(pieces):
        vocab_bytes[i, : len(piece)] = np.frombuffer(piece, np.uint8)
    vocab_lengths = np.array([len(piece) for piece in pieces], np.int32)

    # The responses end in a box with one predicted token.
    tokens = rng.integers(_FIRST_TEXT_ID, vocab, (responses, 1, length)).astype(np.int32)
    predicted = rng.integers(_FIRST_TEXT_ID, vocab, responses).astype(np.int32)
    tokens[:, 0, -_ANSWER_TOKENS] = _END_OF_THINKING
    for offset, ids in enumerate((_BOX, predicted, _CLOSING_BRACE, _STOP)):
        tokens[:, 0, offset - 4] = ids

    # The true continuations are one token each.
    wrong = rng.random(responses) < 0.5
    true = np.where(wrong, rng.integers(_FIRST_TEXT_ID, vocab, responses), predicted)
    boundaries = np.zeros((responses, _LONGEST_TOKEN_BYTES + 1), bool)
    boundaries[np.arange(responses), vocab_lengths[true]] = True
    return Responses(
        tokens_PxGxT=tokens,
        lengths_PxG=np.full((responses, 1), length, np.int32),
        stopped_PxG=np.ones((responses, 1), bool),
        reference_PxR=vocab_bytes[true],
        boundaries_PxRp1=boundaries,
        vocab_bytes_VxX=vocab_bytes,
        vocab_lengths_V=vocab_lengths,
        pieces=pieces,
    )


def python_reward(tokens: list[int], pieces: list[bytes], truth: bytes) -> float:
    """Decode a response, find the last box after the last end of thinking, and compare it with the true token's bytes."""
    if _END_OF_THINKING not in tokens:
        return 0.0
    end = len(tokens) - tokens[::-1].index(_END_OF_THINKING)
    # The whole response is decoded, as a straightforward implementation would.
    text = b"".join([pieces[token] for token in tokens])
    answer = text[len(b"".join([pieces[token] for token in tokens[:end]])) :]
    _, box, content = answer.rpartition(b"\\boxed{")
    prediction, brace, _ = content.partition(b"}")
    return float(bool(box) and bool(brace) and prediction == truth)
