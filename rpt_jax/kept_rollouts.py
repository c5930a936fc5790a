"""Rollouts and evaluated texts as tables, as `infra.rollout_files` keeps them."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rpt_jax.evaluation.next_token import EvaluatedPart
from rpt_jax.evaluation.predictions import read_prediction
from rpt_jax.rewards.responses import split_response, status_name
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.rollouts import Ended
from rpt_jax.sizes.kept_rollouts import CONTEXT_CHARACTERS
from rpt_jax.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa


class Origin(NamedTuple):
    """Where a prompt comes from.

    Attributes:
      source: number of the document that it is taken from, or id of the question.
      window: number of the window in the corpus; -1 for a question.
      position: of the token to predict in its window; -1 for a question.
      entropy: at that position, in nats; NaN for a question.
      context: the text before the position, or that of the question.
      truth: the next token, or the accepted answers.
    """

    source: str
    window: int
    position: int
    entropy: float
    context: bytes
    truth: bytes


class RolloutReading(NamedTuple):
    """How responses are read.

    Attributes:
      statuses: the values of `RewardedRollouts.status_PxG`.
      tokenizer: gives the bytes of tokens.
      box: how the box is read, as `prompt.box_reading`.
    """

    statuses: type[enum.IntEnum]
    tokenizer: Tokenizer
    box: str


def rollout_table(
    rewarded: RewardedRollouts, origins: Sequence[Origin], reading: RolloutReading, *, step: int, split: str
) -> pa.Table:
    """Return a table with one row for each rollout.

    Args:
      rewarded: rollouts on the host.
      origins: of the prompts.
      reading: how responses are read.
      step: that they were sampled at.
      split: what the prompts belong to: "train", "held_out", "unseen" or "test".
    """
    import pyarrow as pa

    rows = []
    for p, origin in enumerate(origins):
        prompt = {
            "step": step,
            "split": split,
            "prompt": p,
            "source": origin.source,
            "window": origin.window,
            "position": origin.position,
            "entropy": origin.entropy,
            "context": readable(origin.context)[-CONTEXT_CHARACTERS:],
            "truth": readable(origin.truth),
        }
        for g in range(rewarded.reward_PxG.shape[1]):
            rows.append({**prompt, "sample": g, **_rollout(rewarded, p, g, reading)})
    return pa.Table.from_pylist(rows, schema=rollout_schema())


def text_table(part: EvaluatedPart, *, step: int, split: str, tokenizer: Tokenizer) -> pa.Table:
    """Return a table with one row for each token of the windows that have an evaluated position.

    Args:
      part: the evaluated part of the corpus.
      step: that it was evaluated at.
      split: its name.
      tokenizer: gives the bytes of tokens.
    """
    import pyarrow as pa

    windows = part.part.windows
    columns: dict[str, list[np.ndarray]] = {"window": [], "position": [], "entropy": [], "direct_correct": []}
    tokens = []
    for index in sorted({position.window for position in part.part.evaluation.positions}):
        ids_S = windows[index]
        tokens += [tokenizer.pieces[token] for token in ids_S]
        columns["window"].append(np.full(len(ids_S), windows.numbers_N[index]))
        columns["position"].append(np.arange(len(ids_S)))
        columns["entropy"].append(part.part.scores[index].entropy_S)
        columns["direct_correct"].append(part.scores[index].top1_correct_S)
    count = len(tokens)
    return pa.table(
        {
            "step": np.full(count, step, np.int32),
            "split": [split] * count,
            **{name: np.concatenate(parts) for name, parts in columns.items()},
            "token": pa.array(tokens, pa.binary()),
        },
        schema=text_schema(),
    )


def readable(data: bytes) -> str:
    """Return bytes as text; those that are not UTF-8, because a token or a response ends inside a character, as escapes."""
    return data.decode("utf-8", "backslashreplace")


def _rollout(rewarded: RewardedRollouts, p: int, g: int, reading: RolloutReading) -> Mapping[str, Any]:
    """Return the columns of one rollout."""
    tokenizer = reading.tokenizer
    rollouts = rewarded.rollouts
    length = int(rollouts.lengths_PxG[p, g])
    token_ids = rollouts.tokens_PxGxT[p, g, :length].tolist()
    finished = bool(rollouts.ended_PxG[p, g] != Ended.LENGTH)
    reasoning, answer = split_response(tokenizer.response_bytes(token_ids))
    box = read_prediction(token_ids, tokenizer.pieces, tokenizer.end_think_id, finished, reading.box).content
    return {
        "status": status_name(reading.statuses(rewarded.status_PxG[p, g])),
        "reward": float(rewarded.reward_PxG[p, g]),
        "length": length,
        "logprob": float(np.sum(rollouts.logprobs_PxGxT[p, g, :length], dtype=np.float64)),
        "reasoning": readable(reasoning),
        "answer": None if answer is None else readable(answer),
        "prediction": None if box is None else readable(box),
    }


def rollout_schema() -> pa.Schema:
    """Return the columns of `rollout_table`."""
    import pyarrow as pa

    return _schema(
        step=pa.int32(),
        split=pa.string(),
        prompt=pa.int32(),
        source=pa.string(),
        window=pa.int64(),
        position=pa.int32(),
        entropy=pa.float32(),
        context=pa.string(),
        truth=pa.string(),
        sample=pa.int32(),
        status=pa.string(),
        reward=pa.float32(),
        length=pa.int32(),
        logprob=pa.float32(),
        reasoning=pa.string(),
        answer=pa.string(),
        prediction=pa.string(),
    )


def text_schema() -> pa.Schema:
    """Return the columns of `text_table`."""
    import pyarrow as pa

    return _schema(
        step=pa.int32(),
        split=pa.string(),
        window=pa.int64(),
        position=pa.int32(),
        entropy=pa.float32(),
        direct_correct=pa.bool_(),
        token=pa.binary(),
    )


def _schema(**types: pa.DataType) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(list(types.items()))
