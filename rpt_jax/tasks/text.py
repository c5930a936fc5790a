"""Task "rpt": positions of a corpus become prompts, and a prediction is rewarded if it matches the true continuation."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.entropy import Scorer, next_token_rows, scoring_flops
from rpt_jax.corpus.prepared import position_flops
from rpt_jax.corpus.tokenized import Windows
from rpt_jax.distributed.processes import to_host
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.evaluation.next_token import EvaluatedPart, EvaluationPart, Evaluator, evaluation_metrics
from rpt_jax.infra.rollout_files import EVALUATION, TEXT
from rpt_jax.infra.run_context import RunContext
from rpt_jax.kept_rollouts import Origin, RolloutReading, rollout_table, text_table
from rpt_jax.model.transformer import Params
from rpt_jax.objective.batch import NextTokenBatch
from rpt_jax.objective.update import TrainState
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.pipeline import PositionOrder
from rpt_jax.prompts.selection import PolicyEntropies, rescoring_is_due, score_sample, training_orders, training_stream
from rpt_jax.questions.question import Question
from rpt_jax.results import next_token_result, show_next_token_evaluations
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import RewardedRollouts, Rewarder
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.rollout.sampler import Sampler, sampling_numbers
from rpt_jax.setup import set_up
from rpt_jax.sizes.plan import plan_evaluation
from rpt_jax.tasks.task import Keep
from rpt_jax.tasks.verification import VerifiedRewarder

if TYPE_CHECKING:
    import pyarrow as pa


class TextTask:
    """Prompts, rewards and evaluation of reinforcement pre-training. Methods and attributes are those of `tasks.task.Task`."""

    statuses: type[enum.IntEnum] = Status
    advice: Mapping[str, str] = {}

    def __init__(self, experiment: Experiment, mesh: Mesh, workdir: Path, context: RunContext):
        """Load the policy, and load the corpus or prepare it in `workdir`. Raises: UserError, as `setup.set_up` does."""
        self._experiment = experiment
        self._mesh = mesh
        self._setup = setup = set_up(experiment, mesh, workdir, context)
        self.policy = setup.policy
        self.params = setup.params
        self.tokenizer = setup.tokenizer
        self._builder = builder = PromptBuilder(experiment.prompt, setup.tokenizer, segments=setup.segments)
        self.sample = Sampler(experiment, setup.policy, setup.tokenizer, mesh, builder)
        self._reward = Rewarder(experiment, setup.policy, setup.tokenizer, mesh, builder)
        self._verify: BatchVerifier | None = None
        self._verified: VerifiedRewarder | None = None
        if experiment.objective.reward == "verified":
            self.statuses = AnswerStatus
            self._verify = BatchVerifier(experiment.questions, setup.tokenizer)
            self._verified = VerifiedRewarder(self._verify, self._reward, mesh)
        self.stream = training_stream(experiment, setup.prepared, setup.train, setup.boxable_V, builder, setup.segments)
        evaluation = plan_evaluation(experiment, mesh)
        same = evaluation == experiment
        sample = self.sample if same else Sampler(evaluation, setup.policy, setup.tokenizer, mesh, builder)
        self._evaluator = Evaluator(evaluation, setup, sample, self._reward, builder)
        self.evaluated = [*self._evaluator.counts, *sampling_numbers(evaluation)]
        self.preparation_flops = position_flops(experiment.data, setup.prepared)
        self._policy_entropies: PolicyEntropies | None = None  # Of the last rescoring.

    def reward(self, state: TrainState, prompts: PromptBatch, rollouts: Rollouts, step: int) -> RewardedRollouts:
        if self._verified is None:
            return self._reward(state, prompts, rollouts, step)
        return self._verified(state, self._questions(prompts), prompts, rollouts, step)

    def reward_metrics(self) -> dict[str, float]:
        return self._verified.take_metrics() if self._verified else {}

    def rescoring_is_due(self, step: int) -> bool:
        return rescoring_is_due(self._experiment, step)

    def rescore(self, step: int, params: Params) -> float:
        setup = self._setup
        scorer = Scorer(setup.policy, params, setup.tokenizer, self._mesh, self._experiment)
        entropies = score_sample(self._experiment, setup.prepared, setup.train, scorer.score_with_progress, step)
        self._policy_entropies = entropies
        self.stream.switch_orders(self._orders(entropies))
        return scoring_flops(setup.policy.config, [len(record[0]) for record in entropies.records.values()])

    def documents(self, rewarded: RewardedRollouts) -> NextTokenBatch | None:
        if not self._experiment.objective.document_weight:
            return None
        rows = [self._setup.train[i] for i in to_host(rewarded.prompts.window_P)]
        size = self._experiment.data.max_document_tokens
        inputs, targets, lengths = next_token_rows(rows, len(rows), self.tokenizer.bos_id, size)
        mask = np.arange(size) < lengths[:, None]
        inputs, targets, mask = shard_prompts((inputs, targets, mask), self._mesh)
        return NextTokenBatch(inputs_NxS=inputs, targets_NxS=targets, mask_NxS=mask)

    def truths(self, prompts: PromptBatch) -> list[bytes]:
        """Return the bytes of the next token, or of the segment, of each prompt."""
        ends_PxRp1 = prompts.boundaries_PxRp1
        ends_P = ends_PxRp1.argmax(axis=1)
        if self._setup.segments:
            ends_P = ends_PxRp1.shape[1] - 1 - ends_PxRp1[:, ::-1].argmax(axis=1)
        return [reference_R[:end].tobytes() for reference_R, end in zip(prompts.reference_PxR, ends_P, strict=True)]

    def rollout_table(self, rewarded: RewardedRollouts, *, step: int) -> pa.Table:
        return self._rollout_table(rewarded, self._setup.train, step=step, split="train")

    def evaluate(self, params: Params, *, step: int, full: bool, keep: Keep) -> dict[str, Any]:
        def keep_rollouts(split: str, part: EvaluationPart, rewarded: RewardedRollouts) -> None:
            keep(EVALUATION, functools.partial(self._rollout_table, rewarded, part.windows, step=step, split=split))

        def keep_part(split: str, evaluated: EvaluatedPart) -> None:
            keep_rollouts(split, evaluated.part, evaluated.rewarded)
            keep(TEXT, functools.partial(text_table, evaluated, step=step, split=split, tokenizer=self.tokenizer))

        if full:
            return self._evaluator.full(params, keep_part)
        part = self._evaluator.held_out
        reasoning = self._evaluator.reasoning(params, part)
        keep_rollouts("held_out", part, reasoning.rewarded)
        return {"reasoning": reasoning.accuracy, "details": reasoning.details}

    def evaluation_metrics(self, evaluation: dict[str, Any]) -> dict[str, float]:
        return evaluation_metrics(evaluation["reasoning"], evaluation.get("direct"), evaluation["details"].get("exact"))

    def show_evaluations(self, evaluations: Mapping[str, dict[str, Any]]) -> None:
        show_next_token_evaluations(evaluations)

    def result(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        return next_token_result(before, after)

    def state(self) -> dict[str, Any]:
        entropies = self._policy_entropies
        return {
            "corpus": self._setup.prepared.fingerprint,
            "policy_entropies": entropies.state() if entropies else None,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        fingerprint = self._setup.prepared.fingerprint
        if saved["corpus"] != fingerprint:
            raise UserError(
                f"the checkpoint was made on another prepared corpus (fingerprint {saved['corpus'][:12]}… there, "
                f"{fingerprint[:12]}… now): restore that corpus, or choose another --workdir.",
                field="data.prepared",
            )
        if saved["policy_entropies"]:
            self._policy_entropies = PolicyEntropies.from_state(saved["policy_entropies"])
            self.stream.switch_orders(self._orders(self._policy_entropies))
        self.stream.set_state(saved["stream"])

    def close(self) -> None:
        self.stream.close()
        if self._verify:
            self._verify.close()

    def _questions(self, prompts: PromptBatch) -> list[Question]:
        """Return the segment of each prompt as the accepted answer of a question, for a verifier."""
        places = zip(prompts.window_P, prompts.position_P, self.truths(prompts), strict=True)
        return [
            Question(id=f"{window}:{position}", text="", answers=(truth.decode(errors="replace"),))
            for window, position, truth in places
        ]

    def _rollout_table(self, rewarded: RewardedRollouts, windows: Windows, *, step: int, split: str) -> pa.Table:
        """Return `rollout_table` of rollouts on the host, whose prompts are from `windows`."""
        prompts = rewarded.prompts
        number_P = windows.numbers_N[prompts.window_P]
        document_P = self._setup.prepared.corpus.document_W[number_P]
        # Prompts may have a right context too.
        places = zip(prompts.window_P, prompts.position_P, strict=True)
        contexts = [self._builder.cut_context(windows[window][:position].tolist()) for window, position in places]
        origins = [
            Origin(
                source=str(document_P[p]),
                window=int(number_P[p]),
                position=int(prompts.position_P[p]),
                entropy=float(prompts.entropy_P[p]),
                context=self.tokenizer.token_bytes(contexts[p]),
                truth=truth,
            )
            for p, truth in enumerate(self.truths(prompts))
        ]
        reading = RolloutReading(self.statuses, self.tokenizer, self._experiment.prompt.box_reading)
        return rollout_table(rewarded, origins, reading, step=step, split=split)

    def _orders(self, entropies: PolicyEntropies) -> list[PositionOrder]:
        """Return the orders of the positions that the policy's own entropies choose."""
        setup = self._setup
        return training_orders(
            self._experiment, setup.prepared, setup.train, setup.boxable_V, entropies, setup.segments
        )
