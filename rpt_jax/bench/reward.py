"""Seconds of the prefix-matching reward against a Python loop that decodes and matches, and its share of a training step.

Random tokens of a vocabulary like that of Qwen2.5, an end of thinking shortly before the end, and a box. The loop reads
--python responses, and its time is given for all of them. A step's time is the least that one can take here: its FLOPs, 8 a
token and parameter of --preset, at the speed of one large matrix product.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.bench.measure import interleaved, matmul_call
from rpt_jax.model.model_config import preset
from rpt_jax.rewards.prefix_match import prefix_match_reward

_END, _STOP, _LONGEST = 0, 1, 128
_ANSWER_TOKENS = 48  # After the end of thinking.


class Responses(NamedTuple):
    """What both read: the kernel's arguments, and the bytes of every token."""

    arguments: tuple[Any, ...]
    pieces: list[bytes]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a response")
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--python", type=int, default=64, help="responses that the Python loop reads")
    parser.add_argument("--preset", default="qwen2.5-14b", help="the policy whose step it is compared with")
    parser.add_argument("--repeats", type=int, default=5)


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where the preset is unknown."""
    shape, count = preset(options.preset), min(options.python, options.responses)
    made = make_responses(options.responses, options.length, options.vocab)
    on_device = jax.device_put(made.arguments)
    tokens, _, _, reference, boundaries, *_ = made.arguments
    rows = tokens[:, 0].tolist()[:count]
    truths = [reference[i, : int(np.flatnonzero(boundaries[i])[0])].tobytes() for i in range(count)]
    multiply, flops = matmul_call("float32" if jax.default_backend() == "cpu" else "bfloat16")
    calls = {
        "kernel": lambda: prefix_match_reward(*on_device),
        "Python loop": lambda: [
            python_reward(row, made.pieces, truth) for row, truth in zip(rows, truths, strict=True)
        ],
        "ceiling": multiply,
    }
    theirs = jnp.array([python_reward(row, made.pieces, truth) for row, truth in zip(rows, truths, strict=True)])
    if not (calls["kernel"]()[0][:count, 0] == theirs).all():
        raise AssertionError("the loop and the kernel do not agree on what is right")
    seconds = interleaved(calls, options.repeats)
    loop = seconds["Python loop"].median * options.responses / count
    step = 8.0 * shape.matmul_parameters * options.responses * options.length / (flops / seconds["ceiling"].low)
    kernel = seconds["kernel"].median
    table = [["kernel", kernel, loop / kernel, kernel / step], ["Python loop", loop, 1.0, loop / step]]
    rounded = [[name, *(float(f"{x:.4g}") for x in figures)] for name, *figures in table]
    return ["reward", "seconds", "times as fast as the loop", "of a step's time"], rounded


def make_responses(responses: int, length: int, vocab: int) -> Responses:
    """Random responses, one to a prompt, of which about half predict the first token of their continuation."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(1 + rng.geometric(0.25, vocab), 16)
    sizes[-1] = _LONGEST
    letters = rng.integers(ord("a"), ord("z") + 1, (vocab, _LONGEST)).astype(np.uint8)
    pieces = [b"", b"", b"\\boxed{", b"}", *(row[:n].tobytes() for row, n in zip(letters[4:], sizes[4:], strict=True))]
    table = np.zeros((vocab, _LONGEST), np.uint8)
    for i, piece in enumerate(pieces):
        table[i, : len(piece)] = np.frombuffer(piece, np.uint8)
    tokens = rng.integers(4, vocab, (responses, 1, length)).astype(np.int32)
    first = rng.integers(4, vocab, responses).astype(np.int32)
    tokens[:, 0, -_ANSWER_TOKENS] = _END
    tokens[:, 0, -4:] = np.stack(
        [np.full(responses, 2), first, np.full(responses, 3), np.full(responses, _STOP)], axis=1
    )
    wrong = rng.random(responses) < 0.5
    truth = np.where(wrong, rng.integers(4, vocab, responses), first)
    lengths_V = np.array([len(piece) for piece in pieces], np.int32)
    boundaries = np.zeros((responses, _LONGEST + 1), bool)
    boundaries[np.arange(responses), lengths_V[truth]] = True
    stopped = np.ones((responses, 1), bool)
    arguments = (
        tokens,
        np.full((responses, 1), length, np.int32),
        stopped,
        table[truth],
        boundaries,
        table,
        lengths_V,
        _END,
    )
    return Responses(arguments, pieces)


def python_reward(tokens: list[int], pieces: list[bytes], truth: bytes) -> float:
    """The obvious way: decode, find the last box after the last end of thinking, compare with the first true token."""
    end = len(tokens) - tokens[::-1].index(_END) if _END in tokens else 0
    text = b"".join([pieces[token] for token in tokens])
    answer = text[len(b"".join([pieces[token] for token in tokens[:end]])) :] if end else b""
    _, box, content = answer.rpartition(b"\\boxed{")
    prediction, brace, _ = content.partition(b"}")
    return float(bool(box) and bool(brace) and prediction == truth)
