"""What a policy makes of a text: entropies, direct predictions, and reasoning at some positions, as one page."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.entropy import Scorer
from rpt_jax.corpus.tokenization import window_ends
from rpt_jax.distributed.mesh import num_batch_shards
from rpt_jax.distributed.processes import to_host
from rpt_jax.errors import UserError
from rpt_jax.evaluation.likelihood import LikelihoodScorer, Request
from rpt_jax.evaluation.next_token import EvaluationSet, sample_predictions
from rpt_jax.kept_rollouts import Origin, RolloutReading, readable, rollout_table
from rpt_jax.model.context_length import trained_context
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import Rewarder
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler
from rpt_jax.run_page.html import render_html
from rpt_jax.run_page.reading import group_rollouts, token_texts
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000  # Of a text: of a longer one, the page would be too large to open.
_SPLIT = "text"
_PROMPTS_AT_ONCE = 32


class Text(NamedTuple):
    """A text to explain.

    Attributes:
      name: of its file.
      windows: its token ids, divided as documents are in training: the policy sees nothing of one window in the next.
    """

    name: str
    windows: list[list[int]]

    @property
    def starts(self) -> list[int]:
        """The number of the first token of each window in the text."""
        return np.cumsum([0, *map(len, self.windows[:-1])]).tolist()


class TokenScores(NamedTuple):
    """What the policy predicts at the S tokens of a window without reasoning.

    Attributes:
      entropy_S: float32, nats; over the most likely next tokens (paper, section 3.3).
      probability_S: float32, of the true token.
      likeliest_S: int32, the most likely token.
    """

    entropy_S: np.ndarray
    probability_S: np.ndarray
    likeliest_S: np.ndarray


def read_text(path: Path) -> str:
    """Return the content of a text file. Raises: UserError, if it cannot be read, is not UTF-8 or is too long."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--text={path} cannot be read ({error.strerror}).", field="--text") from None
    if len(data) > MAX_BYTES:
        raise UserError(
            f"--text={path} has {len(data):,} bytes, and a page explains at most {MAX_BYTES:,}: give a part of it.",
            field="--text",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--text={path} is not UTF-8 (byte {error.start}).", field="--text") from None


def tokenize_text(path: Path, content: str, tokenizer: Tokenizer, max_tokens: int) -> Text:
    """Tokenize a text.

    Args:
      path: its file.
      content: what `read_text` returns for it.
      tokenizer: of the policy.
      max_tokens: of a window.

    Raises: UserError, if the text is too short.
    """
    ids = np.array(tokenizer.encode(content))
    if len(ids) < 2:
        raise UserError(
            f"--text={path} has {len(ids)} tokens, and a prediction needs a context and a token that follows it.",
            field="--text",
        )
    ends = window_ends(np.array([len(ids)]), max_tokens)
    return Text(name=readable(os.fsencode(path.name)), windows=[window.tolist() for window in np.split(ids, ends[:-1])])


def window_tokens(experiment: Experiment, policy: Transformer) -> int:
    """Return how many tokens a window of the text has: as many as in training, and no more than the policy can handle."""
    return min(experiment.data.max_document_tokens, trained_context(policy.config))


def hardest_positions(
    text: Text, scores: Sequence[TokenScores], boxable_V: np.ndarray, count: int, min_context: int
) -> list[Position]:
    """Return the positions with the highest entropy, in the order of the text.

    Args:
      text: the text.
      scores: of each window.
      boxable_V: bool, the tokens that a box can hold; others are not chosen.
      count: number of positions, at most.
      min_context: tokens of its window that a position has before it, at least.

    Raises: UserError, if there is no such position.
    """
    found = [
        Position(window=window, position=position, entropy=float(scored.entropy_S[position]))
        for window, (ids, scored) in enumerate(zip(text.windows, scores, strict=True))
        for position in range(max(1, min_context), len(ids))
        if boxable_V[ids[position]]
    ]
    if not found:
        raise UserError(
            f"--text={text.name}: no token has data.min_context={min_context} tokens before it and fits into a box. Give a "
            "longer text, lower --config.data.min_context, or choose tokens with --at.",
            field="--text",
        )
    return sorted(sorted(found, key=lambda p: -p.entropy)[:count])


def positions_at(
    text: Text, scores: Sequence[TokenScores], boxable_V: np.ndarray, numbers: Sequence[int]
) -> list[Position]:
    """Return the positions with these numbers in the text.

    Args:
      text: the text.
      scores: of each window.
      boxable_V: bool, the tokens that a box can hold.
      numbers: of tokens of the text; the first one has number 0.

    Raises: UserError, if there is no such token, if it has no context, or if no box can hold it.
    """
    total = sum(map(len, text.windows))
    positions = []
    for number in sorted(set(numbers)):
        if not 0 <= number < total:
            raise UserError(f"--at={number}: the text has tokens 0 to {total - 1}.", field="--at")
        window = int(np.searchsorted(text.starts, number, side="right")) - 1
        position = number - text.starts[window]
        if position == 0:
            raise UserError(f"--at={number} is the first token of a window and has no context.", field="--at")
        if not boxable_V[text.windows[window][position]]:
            raise UserError(f"--at={number} is a token that no box can hold, so no prediction is right.", field="--at")
        positions.append(Position(window, position, float(scores[window].entropy_S[position])))
    return positions


class Explainer:
    """Scores texts with a policy, and samples its reasoning at positions of them."""

    def __init__(self, experiment: Experiment, policy: Transformer, params: Params, tokenizer: Tokenizer, mesh: Mesh):
        """
        Args:
          experiment: says how prompts are made and responses are sampled; its memory fields are planned.
          policy: the policy.
          params: its parameters.
          tokenizer: its tokenizer.
          mesh: the devices.

        Raises: UserError, if the tokenizer lacks what the prompt or the sampling needs.
        """
        self._experiment = experiment
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._builder = PromptBuilder(experiment.prompt, tokenizer)
        self._scorer = Scorer(policy, params, tokenizer, mesh, experiment)
        self._likelihoods = LikelihoodScorer(
            policy,
            params,
            mesh,
            tokens_per_pass=experiment.data.score_batch_windows * experiment.data.max_document_tokens,
            logit_chunk_tokens=experiment.training.logit_chunk_tokens,
        )
        self._sample = Sampler(experiment, policy, tokenizer, mesh, self._builder)
        self._reward = Rewarder(experiment, policy, tokenizer, mesh, self._builder)
        self._weights = self._sample.weights(params)
        self.boxable_V = boxable_tokens(tokenizer.byte_vocab, experiment.prompt)

    def score(self, text: Text) -> list[TokenScores]:
        """Return what the policy predicts at each token of each window without reasoning."""
        entropies = [scores.entropy_S for scores in self._scorer.score_with_progress(text.windows)]
        requests = [Request([self._tokenizer.bos_id], [ids]) for ids in text.windows]
        launched = self._likelihoods.launch(requests)
        found: dict[int, TokenScores] = {}
        for members, (logprobs_PxGxT, likeliest_PxGxT) in zip(launched.indices, to_host(launched.arrays), strict=True):
            for row, window in enumerate(members):
                tokens = slice(len(text.windows[window]))
                found[window] = TokenScores(
                    entropy_S=entropies[window],
                    probability_S=np.exp(logprobs_PxGxT[row, 0, tokens]),
                    likeliest_S=likeliest_PxGxT[row, 0, tokens],
                )
        return [found[window] for window in range(len(text.windows))]

    def reason(self, text: Text, positions: Sequence[Position]) -> list[dict[str, Any]]:
        """Return the sampled responses at each position with their rewards by Equation 3, as `group_rollouts` does."""
        prompts = [self._builder.build(i, text.windows[p.window], p) for i, p in enumerate(positions)]
        batch = min(_PROMPTS_AT_ONCE, len(prompts))
        batch += -batch % num_batch_shards(self._mesh)
        padded = [*prompts, *[prompts[-1]] * (-len(prompts) % batch)]
        batches = [stack(padded[i : i + batch]) for i in range(0, len(padded), batch)]
        rewarded = sample_predictions(
            self._sample, self._reward, self._weights, EvaluationSet(list(positions), batches)
        )
        origins = self._origins(text, rewarded.prompts)
        reading = RolloutReading(Status, self._tokenizer, self._experiment.prompt.box_reading)
        rows = rollout_table(rewarded, origins, reading, step=EVALUATION_STEP, split=_SPLIT).to_pylist()
        return [{**group, "step": None} for group in group_rollouts(rows, _SPLIT)]

    def _origins(self, text: Text, prompts: PromptBatch) -> list[Origin]:
        tokenizer = self._tokenizer
        return [
            Origin(
                source=text.name,
                window=int(window),
                position=int(position),
                entropy=float(entropy),
                context=tokenizer.token_bytes(context),
                truth=tokenizer.pieces[text.windows[window][position]],
            )
            for window, position, entropy, context in zip(
                prompts.window_P, prompts.position_P, prompts.entropy_P, self._builder.contexts(prompts), strict=True
            )
        ]


def render_explanation(
    text: Text,
    scores: Sequence[TokenScores],
    groups: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    experiment: Experiment,
    policy: str,
) -> str:
    """Return the page as HTML that needs no other file.

    Args:
      text: the text.
      scores: of each window.
      groups: the responses at the chosen positions.
      tokenizer: gives the bytes of tokens.
      experiment: says how the responses were sampled.
      policy: name of the policy.
    """
    right = [
        bool(scores[group["window"]].likeliest_S[group["position"]] == text.windows[group["window"]][group["position"]])
        for group in groups
    ]
    samples = [sample["reward"] for group in groups for sample in group["samples"]]
    tokens = sum(map(len, text.windows))
    everywhere = np.concatenate(
        [scored.likeliest_S == ids for ids, scored in zip(text.windows, scores, strict=True)]
    ).mean()
    notes = []
    if len(text.windows) > 1:
        notes.append(
            f"The text has {tokens:,} tokens and is divided into {len(text.windows)} windows of at most "
            f"{max(map(len, text.windows)):,}, as documents are in training: the policy sees nothing of one window in the next."
        )
    settings = {
        "samples at a position": experiment.rollout.samples_per_prompt,
        "temperature": experiment.rollout.temperature,
        "longest response, tokens": experiment.rollout.max_new_tokens,
        "prompt template": experiment.prompt.template,
        "seed": experiment.seed,
    }
    return render_html(
        "explain.html",
        "explain.js",
        {
            "groups": list(groups),
            "windows": [
                _shown_window(number, start, ids, scored, tokenizer)
                for number, (start, ids, scored) in enumerate(zip(text.starts, text.windows, scores, strict=True))
            ],
        },
        title=text.name,
        policy_name=policy,
        tokens=tokens,
        positions=len(groups),
        everywhere=f"{everywhere:.1%}",
        direct=f"{sum(right)} of {len(right)}",
        reasoning=f"{np.mean(samples):.1%}",
        notes=notes,
        settings=settings,
    )


def _shown_window(
    number: int, start: int, ids: Sequence[int], scores: TokenScores, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return what the page's script shows of a window."""
    return {
        "window": number,
        "start": start,
        "tokens": list(token_texts(tokenizer.pieces[token] for token in ids)),
        "entropy": [_rounded(entropy) for entropy in scores.entropy_S],
        "probability": [_rounded(probability) for probability in scores.probability_S],
        "likeliest": [
            tokenizer.special_names.get(int(token)) or readable(tokenizer.pieces[token]) for token in scores.likeliest_S
        ],
        "right": (scores.likeliest_S == ids).astype(int).tolist(),
    }


def _rounded(value: np.floating) -> float:
    """Return a number of a page with three significant digits; entropies of certain tokens can be slightly below 0."""
    assert math.isfinite(value)
    return max(0.0, float(f"{value:.3g}"))


def sampling_experiment(
    experiment: Experiment, *, samples: int, temperature: float, length: int, seed: int, positions: int
) -> Experiment:
    """Return an experiment that samples as a page is asked to; 0 leaves the temperature or the length as it is."""
    rollout = experiment.rollout
    return dataclasses.replace(
        experiment,
        seed=seed,
        rollout=dataclasses.replace(
            rollout,
            samples_per_prompt=samples,
            temperature=temperature or rollout.temperature,
            max_new_tokens=length or rollout.max_new_tokens,
        ),
        training=dataclasses.replace(experiment.training, prompts_per_step=min(_PROMPTS_AT_ONCE, positions)),
    )
