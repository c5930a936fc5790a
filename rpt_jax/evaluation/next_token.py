"""Next-token accuracy on held-out documents, predicted directly or after reasoning (paper, section 4.1 and Table 1).

Where targets are segments (`prompts.targets`), the accuracy at a position is the share of the segment's tokens that a prediction
begins with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.corpus.entropy import Scorer, Scores
from rpt_jax.corpus.mixture import source_name
from rpt_jax.corpus.tokenized import Windows
from rpt_jax.distributed.processes import to_host
from rpt_jax.errors import UserError
from rpt_jax.evaluation.statistics import micro_average
from rpt_jax.infra.console import Progress
from rpt_jax.model.transformer import Params
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position, choose_positions
from rpt_jax.prompts.targets import Segments
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import RewardedRollouts, Rewarder
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler
from rpt_jax.setup import Setup

logger = logging.getLogger(__name__)


class EvaluationSet(NamedTuple):
    """Held-out positions and their prompts.

    Attributes:
      positions: the n positions.
      batches: their prompts in whole batches; the last one is padded by repeating the last prompt.
    """

    positions: list[Position]
    batches: list[PromptBatch]


class EvaluationPart(NamedTuple):
    """A held-out part of the corpus.

    Attributes:
      windows: token ids of its windows.
      scores: scores of the windows under the initial policy, by whose entropies the positions were chosen.
      cluster_W: the independent unit that each window belongs to, see `TokenizedCorpus.clusters`.
      evaluation: the positions to evaluate.
      counts: how many positions the part has, by difficulty, and how many more are left out.
    """

    windows: Windows
    scores: list[Scores]
    cluster_W: np.ndarray
    evaluation: EvaluationSet
    counts: dict[str, int]

    def by_difficulty(self, right_N: np.ndarray) -> dict[str, dict[str, Any]]:
        """Return `by_difficulty` of the accuracy at each evaluated position."""
        positions = self.evaluation.positions
        return by_difficulty(right_N, positions, self.cluster_W[[p.window for p in positions]])


class Reasoning(NamedTuple):
    """What reasoning predicts in a held-out part.

    Attributes:
      accuracy: mean accuracy of the sampled predictions, by difficulty.
      details: of the predictions and positions.
      rewarded: the predictions at the n positions, on the host.
    """

    accuracy: dict[str, Any]
    details: dict[str, Any]
    rewarded: RewardedRollouts


class EvaluatedPart(NamedTuple):
    """What a full evaluation found out about a held-out part.

    Attributes:
      part: the part.
      scores: scores of its windows under the evaluated policy.
      rewarded: predictions at its positions, on the host.
    """

    part: EvaluationPart
    scores: list[Scores]
    rewarded: RewardedRollouts


def choose_evaluation_set(
    builder: PromptBuilder,
    windows: Sequence[Sequence[int]],
    positions: Sequence[Position],
    *,
    count: int,
    batch: int,
    seed: int,
) -> EvaluationSet:
    """Draw `count` of `positions`, or all if there are fewer, and build their prompts.

    Args:
      builder: builds the prompts.
      windows: token ids of each window.
      positions: positions in these windows, at least one.
      count: number of positions to draw.
      batch: prompts in a batch.
      seed: of the draw.
    """
    chosen = np.random.default_rng(seed).permutation(len(positions))[:count]
    drawn = [positions[i] for i in sorted(chosen)]
    prompts = [builder.build(i, windows[p.window], p) for i, p in enumerate(drawn)]
    prompts += [prompts[-1]] * (-len(prompts) % batch)
    batches = [stack(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
    return EvaluationSet(positions=drawn, batches=batches)


def direct_accuracy(evaluation: EvaluationSet, scores: Sequence[Scores]) -> np.ndarray:
    """Return for each position whether the most likely next token is the true one, without reasoning, float [n]."""
    return np.array([scores[p.window].top1_correct_S[p.position] for p in evaluation.positions], float)


def direct_share(
    evaluation: EvaluationSet, scores: Sequence[Scores], windows: Sequence[np.ndarray], segments: Segments
) -> np.ndarray:
    """Return the share of each segment's tokens that greedy decoding begins with, without reasoning, float [n].

    Greedy decoding agrees with the text up to the first token that is not the most likely one, given the true tokens before it.
    The right context of a segment is not used.
    """
    shares = []
    for p in evaluation.positions:
        end = segments.ends(windows[p.window])[p.position]
        shares.append(np.cumprod(scores[p.window].top1_correct_S[p.position : end]).mean())
    return np.array(shares)


def by_difficulty(
    right_N: np.ndarray, positions: Sequence[Position], cluster_N: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return the mean of `right_N` over the positions of each difficulty, with its 95 % confidence interval.

    Args:
      right_N: accuracy at each position, in [0, 1].
      positions: the N positions.
      cluster_N: integers, the independent unit that each position belongs to, such as its document.

    Returns: for each difficulty, a dict of "accuracy", "low" and "high" in [0, 1], and the number of "positions".
    """
    entropy_N = np.array([p.entropy for p in positions])
    result = {}
    for name, threshold in DIFFICULTIES.items():
        kept = entropy_N > threshold
        average = micro_average(right_N[kept], cluster_N[kept])
        result[name] = {
            "accuracy": average.mean,
            "low": average.low,
            "high": average.high,
            "positions": int(kept.sum()),
        }
    return result


def sample_predictions(
    sample: Sampler, reward: Rewarder, weights: Params, evaluation: EvaluationSet, *, segments: bool = False
) -> RewardedRollouts:
    """Return G predictions at each of the n positions of an evaluation set, on the host.

    Their reward is that of Equation 3 or, of segments, the share of their tokens that the prediction begins with.

    Args:
      sample: samples the predictions.
      reward: compares them with the text.
      weights: from `Sampler.weights`.
      evaluation: the positions and their prompts; what pads the last batch is left out.
      segments: whether targets are segments.
    """
    match = reward.segment_match if segments else reward.prefix_match
    results = []
    with Progress("evaluate, batches", len(evaluation.batches), transient=True) as progress:
        for prompts in evaluation.batches:
            rollouts, _ = sample(weights, prompts, EVALUATION_STEP)
            results.append(to_host(match(prompts, rollouts)))
            progress.advance()
    count = len(evaluation.positions)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *results)


class Evaluator:
    """Measures accuracy, direct and after reasoning, at held-out positions chosen by the initial policy's entropies."""

    def __init__(self, experiment: Experiment, setup: Setup, sample: Sampler, reward: Rewarder, builder: PromptBuilder):
        """
        Args:
          experiment: the config, with the sampling of evaluations (`evaluation_experiment`).
          setup: initial policy and corpus.
          sample: samples the predictions.
          reward: compares them with the text.
          builder: builds the prompts.

        Raises: UserError, if no held-out position belongs to a difficulty level.
        """
        self._experiment = experiment
        self._setup = setup
        self._sample = sample
        self._reward = reward
        self._builder = builder
        evaluation = experiment.evaluation
        # Evaluations with other numbers of positions are not comparable with this one.
        self.counts = [evaluation.positions, evaluation.unseen_positions]
        self.held_out = self._choose_part("held_out", setup.held_out, evaluation.positions)
        self.unseen = None
        if len(setup.unseen):
            self.unseen = self._choose_part("unseen", setup.unseen, evaluation.unseen_positions)

    def reasoning(self, params: Params, part: EvaluationPart) -> Reasoning:
        """Sample predictions at the positions of a part, and return their accuracy by difficulty.

        Of segments, the accuracy is the share of their tokens that a prediction begins with, and the details say how often a
        prediction is exactly the segment.
        """
        weights = self._sample.weights(params)
        segments = self._setup.segments is not None
        rewarded = sample_predictions(self._sample, self._reward, weights, part.evaluation, segments=segments)
        has_box = ~np.isin(rewarded.status_PxG, (Status.NO_BOX, Status.NOT_FINISHED))
        details: dict[str, Any] = {
            "format_rate": float(has_box.mean()),
            "response_length": float(rewarded.rollouts.lengths_PxG.mean()),
            "candidates": part.counts,
        }
        if segments:
            exact_NxG = (rewarded.reward_PxG == 1.0) & (rewarded.status_PxG == Status.CORRECT)
            details["exact"] = part.by_difficulty(np.mean(exact_NxG, axis=1))
        accuracy = part.by_difficulty(np.mean(rewarded.reward_PxG, axis=1))
        return Reasoning(accuracy=accuracy, details=details, rewarded=rewarded)

    def full(
        self, params: Params, keep: Callable[[str, EvaluatedPart], None] = lambda split, part: None
    ) -> dict[str, Any]:
        """Return the complete evaluation that is reported before and after training.

        Args:
          params: of the policy, sharded for training.
          keep: called with each part that was evaluated and its name, "held_out" or "unseen".
        """
        reasoning, direct = self._evaluate_part("held_out", params, self.held_out, keep)
        result = {"direct": direct, "reasoning": reasoning.accuracy, "details": reasoning.details}
        if self.unseen:
            reasoning, direct = self._evaluate_part("unseen", params, self.unseen, keep)
            result["unseen"] = {"direct": direct, "reasoning": reasoning.accuracy}
        return result

    def _evaluate_part(
        self, split: str, params: Params, part: EvaluationPart, keep: Callable[[str, EvaluatedPart], None]
    ) -> tuple[Reasoning, dict[str, Any]]:
        """Return the predictions by reasoning, and the accuracy of the most likely next token by difficulty.

        Of segments, the latter is the share of greedy decoding.
        """
        reasoning = self.reasoning(params, part)
        scores = part.scores if params is self._setup.params else self._score(params, part.windows)
        keep(split, EvaluatedPart(part=part, scores=scores, rewarded=reasoning.rewarded))
        segments = self._setup.segments
        if segments:
            return reasoning, part.by_difficulty(direct_share(part.evaluation, scores, part.windows, segments))
        return reasoning, part.by_difficulty(direct_accuracy(part.evaluation, scores))

    def _score(self, params: Params, windows: Windows) -> list[Scores]:
        setup = self._setup
        scorer = Scorer(
            policy=setup.policy, params=params, tokenizer=setup.tokenizer, mesh=setup.mesh, config=self._experiment
        )
        return scorer.score_with_progress(windows)

    def _choose_part(self, split: str, windows: Windows, count: int) -> EvaluationPart:
        """Choose the positions of a split: a sample of those of the easiest difficulty, which includes the others."""
        data = self._experiment.data
        reason = f"are before a token that no box can hold (prompt.box_reading='{self._experiment.prompt.box_reading}')"
        if self._setup.segments:
            reason = "begin a segment that cannot be a target"
        scores = self._score(self._setup.params, windows)
        positions, left_out = choose_positions(
            windows,
            [s.entropy_S if data.entropy_renormalized else s.partial_entropy_S for s in scores],
            self._setup.boxable_V,
            min(DIFFICULTIES.values()),
            data.min_context,
            self._setup.segments,
        )
        counts = {name: sum(p.entropy > low for p in positions) for name, low in DIFFICULTIES.items()}
        levels = ", ".join(f"{counts[name]:,} {name} (> {low} nats)" for name, low in DIFFICULTIES.items())
        if not positions:
            raise UserError(
                f"{source_name(data)}: the {len(windows)} windows of the split '{split}' have no position to evaluate: {levels} "
                f"after at least data.min_context={data.min_context} tokens, and {left_out} that {reason}. "
                "Hold out more documents with data.held_out_documents, lower data.min_context, or use another corpus.",
                field="data.held_out_documents",
            )
        logger.info(
            f"Positions of the split '{split}': {levels}; {min(count, len(positions)):,} of them are evaluated. {left_out:,} "
            f"more are left out: they {reason}."
        )
        evaluation = choose_evaluation_set(
            self._builder,
            windows,
            positions,
            count=count,
            batch=self._experiment.training.prompts_per_step,
            seed=data.seed,
        )
        return EvaluationPart(
            windows=windows,
            scores=scores,
            cluster_W=self._setup.prepared.corpus.clusters(split),
            evaluation=evaluation,
            counts={**counts, "left_out": left_out},
        )


def evaluation_metrics(
    reasoning: dict[str, Any], direct: dict[str, Any] | None = None, exact: dict[str, Any] | None = None
) -> dict[str, float]:
    """Return scalars for metrics.jsonl: `eval/reasoning/<difficulty>` and, if given, `eval/direct/…` and `eval/exact/…`.

    The ends of their 95 % intervals have the same names with `/low` and `/high`. A difficulty without positions has no accuracy
    and is left out.
    """
    modes = {"reasoning": reasoning, "direct": direct or {}, "exact": exact or {}}
    return {
        f"eval/{mode}/{name}{suffix}": result[key]
        for mode, results in modes.items()
        for name, result in results.items()
        for key, suffix in (("accuracy", ""), ("low", "/low"), ("high", "/high"))
        if result["positions"]
    }
