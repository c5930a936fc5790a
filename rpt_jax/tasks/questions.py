"""Task "rft": prompts are questions, and a response is rewarded if a verifier accepts its answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.errors import UserError
from rpt_jax.evaluation.questions import (
    QuestionSampling,
    evaluate_questions,
    question_metrics,
    show_question_results,
)
from rpt_jax.infra.rollout_files import EVALUATION
from rpt_jax.infra.run_context import RunContext
from rpt_jax.kept_rollouts import Origin, RolloutReading, rollout_table
from rpt_jax.model.transformer import Params
from rpt_jax.objective.batch import NextTokenBatch
from rpt_jax.objective.update import TrainState
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.question_prompts import QuestionPrompts, question_stream, questions_fingerprint, tokenize_questions
from rpt_jax.rewards.rewarder import RewardedRollouts, Rewarder
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier, load_verifiable_questions
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.rollout.sampler import Sampler, sampling_numbers
from rpt_jax.setup import load_policy_to_train
from rpt_jax.sizes.plan import plan_evaluation
from rpt_jax.tasks.task import Keep
from rpt_jax.tasks.verification import VerifiedRewarder

if TYPE_CHECKING:
    import pyarrow as pa


class QuestionTask:
    """Prompts, rewards and evaluation of reinforcement fine-tuning. Methods and attributes are those of `tasks.task.Task`."""

    statuses = AnswerStatus
    preparation_flops = 0.0

    def __init__(self, experiment: Experiment, mesh: Mesh, workdir: Path, context: RunContext):
        """Load the policy and the questions, and start the verifiers. Raises: UserError."""
        del context
        self.policy, self.params, self.tokenizer = load_policy_to_train(experiment, mesh)
        self._builder = builder = PromptBuilder(experiment.prompt, self.tokenizer, experiment.prompt_slot)
        questions = load_verifiable_questions(experiment, self.params, self.tokenizer, workdir)
        self._rejected = questions.rejected
        self._train = tokenize_questions(questions.train, builder, self.tokenizer, "training")
        self._test = tokenize_questions(questions.test, builder, self.tokenizer, "test")
        self._fingerprint = questions_fingerprint(self._train.questions)
        self.stream = question_stream(experiment, self._train, builder)
        self.sample = Sampler(experiment, self.policy, self.tokenizer, mesh, builder)
        rewarder = Rewarder(experiment, self.policy, self.tokenizer, mesh, builder)
        evaluation = plan_evaluation(experiment, mesh)
        same = evaluation == experiment
        sample = self.sample if same else Sampler(evaluation, self.policy, self.tokenizer, mesh, builder)
        self._verify = BatchVerifier(experiment.questions, self.tokenizer)
        self._reward = VerifiedRewarder(self._verify, rewarder, mesh)
        self._evaluation = QuestionSampling(sample, self._test, builder, evaluation.training.prompts_per_step)
        self.evaluated = [len(self._test.questions), *sampling_numbers(evaluation)]
        self.advice = _advice(experiment)

    def reward(self, state: TrainState, prompts: PromptBatch, rollouts: Rollouts, step: int) -> RewardedRollouts:
        return self._reward(state, self._train.of(prompts), prompts, rollouts, step)

    def reward_metrics(self) -> dict[str, float]:
        return self._reward.take_metrics()

    def rescoring_is_due(self, step: int) -> bool:
        return False

    def rescore(self, step: int, params: Params) -> float:
        raise NotImplementedError("questions are not chosen again")

    def documents(self, rewarded: RewardedRollouts) -> NextTokenBatch | None:
        return None

    def truths(self, prompts: PromptBatch) -> list[bytes]:
        """Return the accepted answers of each question."""
        return _truths(self._train, prompts)

    def rollout_table(self, rewarded: RewardedRollouts, *, step: int) -> pa.Table:
        return self._rollout_table(rewarded, self._train, step=step, split="train")

    def evaluate(self, params: Params, *, step: int, full: bool, keep: Keep) -> dict[str, Any]:
        def keep_rollouts(rewarded: RewardedRollouts) -> None:
            keep(EVALUATION, functools.partial(self._rollout_table, rewarded, self._test, step=step, split="test"))

        return evaluate_questions(self._evaluation, params, self._verify, keep_rollouts)

    def evaluation_metrics(self, evaluation: dict[str, Any]) -> dict[str, float]:
        return question_metrics(evaluation)

    def show_evaluations(self, evaluations: Mapping[str, dict[str, Any]]) -> None:
        show_question_results(evaluations)

    def result(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        return {"rejected_questions": self._rejected, "before": before, "after": after}

    def state(self) -> dict[str, Any]:
        return {"questions": self._fingerprint}

    def restore(self, saved: dict[str, Any]) -> None:
        if saved["questions"] != self._fingerprint:
            raise UserError(
                f"the checkpoint was made with other training questions (fingerprint {saved['questions'][:12]}… there, "
                f"{self._fingerprint[:12]}… now): restore those questions, or choose another --workdir.",
                field="questions.source",
            )
        self.stream.set_state(saved["stream"])

    def close(self) -> None:
        self.stream.close()
        self._verify.close()

    def _rollout_table(
        self, rewarded: RewardedRollouts, questions: QuestionPrompts, *, step: int, split: str
    ) -> pa.Table:
        """Return `rollout_table` of rollouts on the host, whose prompts ask `questions`."""
        prompts = rewarded.prompts
        asked = zip(questions.of(prompts), self._builder.contexts(prompts), _truths(questions, prompts), strict=True)
        origins = [
            Origin(
                source=question.id,
                window=-1,
                position=-1,
                entropy=math.nan,
                context=self.tokenizer.token_bytes(context),
                truth=truth,
            )
            for question, context, truth in asked
        ]
        return rollout_table(
            rewarded, origins, RolloutReading(self.statuses, self.tokenizer, "balanced"), step=step, split=split
        )


def _truths(questions: QuestionPrompts, prompts: PromptBatch) -> list[bytes]:
    return [" or ".join(question.answers).encode() for question in questions.of(prompts)]


def _advice(experiment: Experiment) -> dict[str, str]:
    """Return what to do if most responses have a status and nothing can be learned, by the name of the status."""
    filtered = "train on questions that the policy sometimes solves: measure pass rates with task='difficulty'"
    format_advice = (
        "the policy does not answer in a box. Ask for one with prompt.template='boxed_answer' (and prompt.chat_template=True for "
        "a chat model), or start from the policy of a run of task 'rpt' that has learned it with cold_start.total_steps."
    )
    return {
        "no_box": format_advice,
        "empty": format_advice,
        "correct": f"every answer is right; {filtered} and questions.max_passes.",
        "wrong": f"the policy answers in the right format, but no answer is right; {filtered} and questions.min_passes.",
        "unverified": (
            f"answers could not be verified in questions.verifier_seconds={experiment.questions.verifier_seconds:g}; raise it."
        ),
    }
