"""Next-token accuracy on held-out documents: directly, and by reasoning (paper, section 4.1 and Table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.corpus.entropy import Scorer, Scores
from rpt_jax.corpus.sources import source_name
from rpt_jax.corpus.tokenized import Windows
from rpt_jax.distributed.processes import to_host
from rpt_jax.errors import UserError
from rpt_jax.model.transformer import Params
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position, choose_positions
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.setup import Setup

# Folded into the run's key in place of a step: all evaluations of a run share their noise.
_NOISE = 2**31 - 1
_Z = 1.96  # Standard errors to either side of a 95 % interval.


class EvaluationSet(NamedTuple):
    """Held-out positions and their prompts, filled up to whole batches by repeating the last one."""

    positions: list[Position]
    batches: list[PromptBatch]


def choose_evaluation_set(
    builder: PromptBuilder,
    documents: Sequence[Sequence[int]],
    positions: Sequence[Position],
    *,
    count: int,
    batch: int,
    seed: int,
) -> EvaluationSet:
    """Draw `count` of `positions` (all, where there are fewer) and build their prompts in batches of `batch`."""
    chosen = np.random.default_rng(seed).permutation(len(positions))[:count]
    picked = [positions[i] for i in sorted(chosen)]
    prompts = [builder.build(i, documents[p.window], p) for i, p in enumerate(picked)]
    prompts += [prompts[-1]] * (-len(prompts) % batch)
    return EvaluationSet(picked, [stack(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])


def direct_accuracy(evaluation: EvaluationSet, scores: Sequence[Scores]) -> np.ndarray:
    """Standard next-token prediction: whether the likeliest token is the true one, float [n]."""
    return np.array([scores[p.window].top1_correct_S[p.position] for p in evaluation.positions], float)


def by_split(right_N: np.ndarray, positions: Sequence[Position]) -> dict[str, dict[str, Any]]:
    """Mean of `right_N` over each split with a 95 % interval (see `_interval`)."""
    entropy_N = np.array([p.entropy for p in positions])
    document_N = np.array([p.window for p in positions])
    result = {}
    for name, threshold in DIFFICULTIES.items():
        kept = entropy_N > threshold
        accuracy = float(right_N[kept].mean()) if kept.any() else 0.0
        low, high = _interval(right_N[kept], document_N[kept], accuracy)
        result[name] = {"accuracy": accuracy, "low": low, "high": high, "positions": int(kept.sum())}
    return result


def _interval(right_N: np.ndarray, document_N: np.ndarray, mean: float) -> tuple[float, float]:
    """95 % interval of `mean`, with documents as the independent units.

    Positions of one document stand or fall together, and an interval over positions would be too narrow. It is normal, with
    the variance between documents. Where they show none (a single document, or all of them alike, as where everything is
    wrong) that says nothing of the next one: then it is Wilson's for as many observations as documents. Without any, it is
    everything from 0 to 1.
    """
    _, cluster_N = np.unique(document_N, return_inverse=True)
    residuals_C = np.bincount(cluster_N, weights=right_N - mean)
    count = len(residuals_C)
    spread = float(np.sqrt(np.sum(residuals_C**2)))
    if count > 1 and spread > 1e-9 * len(right_N):
        middle, error = mean, _Z * np.sqrt(count / (count - 1)) * spread / len(right_N)
    else:
        middle = (count * mean + _Z**2 / 2) / (count + _Z**2)
        error = _Z * np.sqrt(count * mean * (1 - mean) + _Z**2 / 4) / (count + _Z**2)
    return max(0.0, float(middle - error)), min(1.0, float(middle + error))


class Held(NamedTuple):
    """A held-out part of the corpus, what the starting policy makes of it, and the positions that are asked for."""

    documents: Windows
    scores: list[Scores]
    evaluation: EvaluationSet


class Evaluator:
    """Direct and reasoned accuracy on held-out positions, which the starting policy's entropy chose."""

    def __init__(self, experiment: Experiment, setup: Setup, sample: Sampler, builder: PromptBuilder):
        """Raises: UserError, where no held-out position is above the entropy threshold."""
        self._experiment, self._setup, self._sample, self._builder = experiment, setup, sample, builder
        e = experiment.evaluation
        self.counts = [e.positions, e.unseen_positions]  # What two evaluations must have alike to be compared.
        held_out, unseen = (self._score(setup.params, part) for part in (setup.held_out, setup.unseen))
        self.held_out = self._hold(setup.held_out, held_out, e.positions)
        self.unseen = self._hold(setup.unseen, unseen, e.unseen_positions) if unseen else None

    def _score(self, params: Params, documents: Windows) -> list[Scores]:
        setup = self._setup
        return Scorer(setup.policy, params, setup.tokenizer, setup.mesh, self._experiment).score(documents)

    def _hold(self, documents: Windows, scores: list[Scores], count: int) -> Held:
        data = self._experiment.data
        positions = choose_positions(scores, data.entropy_threshold, data.min_context)
        if not positions:
            raise UserError(
                f"{source_name(data)}: no position of the {len(documents)} held-out documents has an entropy above "
                f"data.entropy_threshold={data.entropy_threshold} and data.min_context={data.min_context} tokens before it: "
                "lower one of the two, or give a longer corpus."
            )
        batch = self._experiment.training.prompts_per_step
        kwargs = {"count": count, "batch": batch, "seed": data.seed}
        return Held(documents, scores, choose_evaluation_set(self._builder, documents, positions, **kwargs))

    def direct(self, params: Params, held: Held) -> dict[str, Any]:
        """Accuracy of the likeliest next token, by split."""
        scores = held.scores if params is self._setup.params else self._score(params, held.documents)
        return by_split(direct_accuracy(held.evaluation, scores), held.evaluation.positions)

    def reasoning(self, params: Params, held: Held) -> tuple[dict[str, Any], dict[str, float]]:
        """Mean accuracy of sampled predictions by split, and their format rate and length."""
        reward_NxG, status_NxG, length_NxG = self.predictions(params, held)
        has_box = ~np.isin(status_NxG, (Status.NO_BOX, Status.NOT_FINISHED))
        details = {"format_rate": float(has_box.mean()), "response_length": float(length_NxG.mean())}
        return by_split(reward_NxG.mean(axis=1), held.evaluation.positions), details

    def predictions(self, params: Params, held: Held) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample G predictions for each of the n positions; return reward, status and length in tokens, each [n, G]."""
        parts, weights = [], self._sample.weights(params)
        for prompts in held.evaluation.batches:
            sampled = self._sample(weights, prompts, _NOISE)
            parts.append(to_host((sampled.reward_PxG, sampled.status_PxG, sampled.rollouts.lengths_PxG)))
        count = len(held.evaluation.positions)
        reward, status, length = (np.concatenate(leaves)[:count] for leaves in zip(*parts, strict=True))
        return reward, status, length

    def full(self, params: Params) -> dict[str, Any]:
        """Everything that is reported before and after training."""
        reasoning, details = self.reasoning(params, self.held_out)
        result = {"direct": self.direct(params, self.held_out), "reasoning": reasoning, "details": details}
        if self.unseen:
            direct, (reasoning, _) = self.direct(params, self.unseen), self.reasoning(params, self.unseen)
            result["unseen"] = {"direct": direct, "reasoning": reasoning}
        return result


def evaluation_metrics(reasoning: dict[str, Any], direct: dict[str, Any] | None = None) -> dict[str, float]:
    """Scalars for metrics.jsonl: `eval/reasoning/<split>` and, where it was measured, `eval/direct/<split>`.

    A split without positions has no accuracy.
    """
    modes = {"reasoning": reasoning, "direct": direct or {}}
    return {
        f"eval/{mode}/{name}": split["accuracy"]
        for mode, splits in modes.items()
        for name, split in splits.items()
        if split["positions"]
    }
