"""Suites that ask questions: "questions" with a verifier, and multiple choice by a boxed letter or by likelihood."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rpt_jax.config.derived import multiple_choice_experiment
from rpt_jax.evaluation.likelihood import LikelihoodScorer, Request, collect
from rpt_jax.evaluation.multiple_choice import (
    LETTERS,
    boxed_letter_text,
    letter_prompt,
    likelihood_choices,
    random_letter,
    read_letter,
    text_prompt,
    why_unusable,
)
from rpt_jax.evaluation.statistics import majority_correct, pass_at_k, powers_of_two
from rpt_jax.evaluation.stored_results import Record
from rpt_jax.evaluation.suite import SUITES, SuiteInputs
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.question_prompts import question_batches, question_text, questions_fingerprint, tokenize_questions
from rpt_jax.questions.loading import QuestionSets, load_questions
from rpt_jax.questions.question import Question
from rpt_jax.rewards.verified import REJECTED_QUESTIONS, AnswerStatus, BatchVerifier
from rpt_jax.rewards.verifiers import why_unreadable
from rpt_jax.rollout.rollouts import Ended
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler

logger = logging.getLogger(__name__)


class _SampledSuite:
    """A suite that samples responses to test questions in batches."""

    def __init__(
        self,
        inputs: SuiteInputs,
        sets: QuestionSets,
        text_of: Callable[[Question], str],
        template: str,
        slot: str,
    ):
        """
        Args:
          inputs: the policy, and the config, whose section `rollout` says how responses are sampled.
          sets: the questions.
          text_of: returns the text that stands in the prompt for a question.
          template: prompt template.
          slot: what the template has braces around.

        Raises: UserError, if all questions are too long for a prompt.
        """
        experiment = inputs.experiment
        prompt = dataclasses.replace(experiment.prompt, template=template)
        self._builder = PromptBuilder(prompt, inputs.tokenizer, slot)
        self._tokenizer = inputs.tokenizer
        self._batch = experiment.training.prompts_per_step
        self._prompts = tokenize_questions(sets.test, self._builder, inputs.tokenizer, "test", text_of)
        self._rejected = sets.rejected
        self._sample = Sampler(experiment, inputs.policy, inputs.tokenizer, inputs.mesh, self._builder)
        self._weights = self._sample.weights(inputs.params)

    @property
    def count(self) -> int:
        """Number of batches."""
        return -(-len(self._prompts.questions) // self._batch)

    @property
    def fingerprint(self) -> str:
        """Digest of the questions."""
        return questions_fingerprint(self._prompts.questions)

    def response_summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the numbers of questions left out or rejected, the share of truncated responses and the mean length."""
        return {
            "left_out": self._prompts.left_out,
            "rejected": self._rejected,
            "truncated": 1.0 - float(np.mean([record["finished"] for record in records])),
            "response_length": float(np.mean([record["lengths"] for record in records])),
        }

    def of_batch(self, batch: int) -> Sequence[Question]:
        """Return the questions of a batch."""
        return self._prompts.questions[batch * self._batch : (batch + 1) * self._batch]

    def launch(self, batch: int) -> Any:
        """Start to sample responses to the questions of a batch."""
        first = batch * self._batch
        chosen = range(first, first + len(self.of_batch(batch)))
        [prompts] = question_batches(self._prompts, self._builder, self._batch, chosen)
        _, rollouts, _ = self._sample.launch(self._weights, prompts, EVALUATION_STEP)
        return rollouts

    def response_fields(self, rollouts: Any, p: int) -> dict[str, Any]:
        """Return what every record says about the responses to the question in row p."""
        lengths_G = rollouts.lengths_PxG[p]
        tokens_GxT = rollouts.tokens_PxGxT[p]
        return {
            "finished": (rollouts.ended_PxG[p] != Ended.LENGTH).tolist(),
            "lengths": lengths_G.tolist(),
            "responses": [
                self._tokenizer.decode(tokens_T[:length])
                for tokens_T, length in zip(tokens_GxT, lengths_G, strict=True)
            ],
        }


def load_test_questions(inputs: SuiteInputs, why: Callable[[Question], str]) -> QuestionSets:
    """Return the questions, those to test with in the order of their ids, so that a rerun has the same batches.

    Args:
      inputs: the config, whose section `questions` names them.
      why: returns why a question cannot be used, "" if it can; such questions are counted and listed in the workdir.

    Raises: UserError, if there are none.
    """
    listing = inputs.workdir / REJECTED_QUESTIONS
    sets = load_questions(inputs.experiment.questions, why, listing=listing, for_training=False)
    return dataclasses.replace(sets, test=tuple(sorted(sets.test, key=lambda question: question.id)))


def question_fields(question: Question) -> dict[str, Any]:
    """Return what every record says about its question."""
    return {
        "id": question.id,
        "category": question.category,
        "question": question_text(question),
        "answers": list(question.answers),
    }


def sample_scores(correct: Sequence[float], name: str) -> dict[str, float]:
    """Return avg@k of the samples to a question, and pass@k for k = 2, 4, … up to all of them.

    Args:
      correct: whether each sample is correct, 0 or 1.
      name: of the average where there is only one sample.
    """
    samples = len(correct)
    scores = {name if samples == 1 else f"avg@{samples}": float(np.mean(correct))}
    for k in powers_of_two(samples)[1:]:
        scores[f"pass@{k}"] = float(pass_at_k(np.array([correct]), k)[0])
    return scores


@SUITES.register("questions", questions=True)
class QuestionSuite(_SampledSuite):
    """Questions with verifiable answers: avg@k and pass@k with the verifier of `questions.verifier`."""

    def __init__(self, inputs: SuiteInputs):
        """
        Args:
          inputs: the policy, and the config that names the questions and their verifier.

        Raises: UserError, if the questions, the verifier or the prompts cannot be used.
        """
        experiment = inputs.experiment
        sets = load_test_questions(inputs, functools.partial(why_unreadable, experiment.questions.verifier))
        super().__init__(inputs, sets, question_text, experiment.prompt.template, "question")
        self._verify = BatchVerifier(experiment.questions, inputs.tokenizer)

    def records(self, batch: int, arrays: Any) -> list[Record]:
        """Verify the responses to the questions of a batch."""
        questions = self.of_batch(batch)
        verified = self._verify.submit(questions, arrays).result()
        records = []
        for p, question in enumerate(questions):
            status_G = verified.status_PxG[p]
            correct = (status_G == AnswerStatus.CORRECT).astype(float).tolist()
            scores = sample_scores(verified.score_PxG[p].tolist(), "accuracy")
            scores |= {name: value for name, value in sample_scores(correct, "accuracy").items() if "pass" in name}
            records.append(
                {
                    **question_fields(question),
                    "status": [AnswerStatus(status).name.lower() for status in status_G],
                    "correct": correct,
                    **self.response_fields(arrays, p),
                    "scores": scores,
                }
            )
        return records

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the share of each outcome, of truncated responses, and the mean length."""
        statuses = [status for record in records for status in record["status"]]
        shares = {status.name.lower(): statuses.count(status.name.lower()) / len(statuses) for status in AnswerStatus}
        return self.response_summary(records) | {"status": shares}

    def close(self) -> None:
        """End the worker processes of the verifier."""
        self._verify.close()


@SUITES.register("multiple_choice", questions=True, sampling=multiple_choice_experiment)
class MultipleChoiceSuite(_SampledSuite):
    """Multiple choice after reasoning, zero-shot: the policy puts a letter in a box (paper, section 4.4)."""

    def __init__(self, inputs: SuiteInputs):
        """
        Args:
          inputs: the policy, and the config that names the questions; section `multiple_choice` is the protocol.

        Raises: UserError, if no question is multiple choice, or if the prompts cannot be used.
        """
        experiment = inputs.experiment
        self._protocol = experiment.multiple_choice
        self._seed = experiment.seed
        sets = load_test_questions(inputs, why_unusable)
        super().__init__(inputs, sets, boxed_letter_text, "plain", "context")

    def records(self, batch: int, arrays: Any) -> list[Record]:
        """Read the letters of the responses to the questions of a batch."""
        return [
            self._record(question, self.response_fields(arrays, p)) for p, question in enumerate(self.of_batch(batch))
        ]

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the shares of unparsed responses, of letters that are no option and of truncated responses, and the length."""
        letters = [(letter, record["options"]) for record in records for letter in record["letters"]]
        return self.response_summary(records) | {
            "unparsed": float(np.mean([letter is None for letter, _ in letters])),
            "not_an_option": float(np.mean([bool(letter) and letter not in options for letter, options in letters])),
        }

    def _record(self, question: Question, responses: dict[str, Any]) -> Record:
        """Return the record of a question, given the fields of its responses."""
        letters = [read_letter(response) for response in responses["responses"]]
        counted = list(letters)
        if self._protocol.unparsed == "random":
            counted = [letter or random_letter(question, sample, self._seed) for sample, letter in enumerate(letters)]
        correct = [float(letter in question.answers) for letter in counted]
        scores = sample_scores(correct, "accuracy")
        if len(correct) > 1:
            scores["majority"] = majority_correct(counted, correct)
        return {
            **question_fields(question),
            "options": LETTERS[: len(question.choices)],
            "letters": letters,
            "correct": correct,
            **responses,
            "scores": scores,
        }


@SUITES.register("multiple_choice_likelihood", questions=True)
class LikelihoodSuite:
    """Multiple choice without reasoning: the most likely letter, and the most likely text of an option."""

    def __init__(self, inputs: SuiteInputs):
        """
        Args:
          inputs: the policy, and the config that names the questions.

        Raises: UserError, if no question is multiple choice.
        """
        experiment = inputs.experiment
        self._tokenizer = inputs.tokenizer
        sets = load_test_questions(inputs, why_unusable)
        self._questions = sets.test
        self._rejected = sets.rejected
        self._batch = experiment.training.prompts_per_step
        self._scorer = LikelihoodScorer(
            inputs.policy,
            inputs.params,
            inputs.mesh,
            tokens_per_pass=experiment.rollout.prefill_tokens,
            logit_chunk_tokens=experiment.training.logit_chunk_tokens,
        )

    @property
    def count(self) -> int:
        """Number of batches."""
        return -(-len(self._questions) // self._batch)

    @property
    def fingerprint(self) -> str:
        """Digest of the questions."""
        return questions_fingerprint(self._questions)

    def launch(self, batch: int) -> Any:
        """Start to score the letters and the texts of the options."""
        launched = self._scorer.launch(self._requests(batch))
        return {"rows": launched.indices, "arrays": launched.arrays}

    def records(self, batch: int, arrays: Any) -> list[Record]:
        """Return the most likely option of each question by each measure."""
        likelihoods = collect(self._requests(batch), arrays["rows"], arrays["arrays"])
        records = []
        for i, question in enumerate(self._of_batch(batch)):
            letters, texts = ([likelihood.logprob for likelihood in found] for found in likelihoods[2 * i : 2 * i + 2])
            chosen = likelihood_choices(letters, texts, [len(choice.encode()) for choice in question.choices])
            records.append(
                {
                    **question_fields(question),
                    "chosen": chosen,
                    "letter_logprobs": letters,
                    "text_logprobs": texts,
                    "scores": {measure: float(letter in question.answers) for measure, letter in chosen.items()},
                }
            )
        return records

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the numbers of questions that were rejected."""
        return {"rejected": self._rejected}

    def _of_batch(self, batch: int) -> Sequence[Question]:
        return self._questions[batch * self._batch : (batch + 1) * self._batch]

    def _requests(self, batch: int) -> list[Request]:
        """Return two requests for each question: for the letters of its options, and for their texts."""
        encode = self._tokenizer.encode
        prefix = list(self._tokenizer.prefix_ids)
        requests = []
        for question in self._of_batch(batch):
            letters = [encode(f" {letter}") for letter in LETTERS[: len(question.choices)]]
            texts = [encode(f" {choice}") for choice in question.choices]
            requests.append(Request(prefix + encode(letter_prompt(question)), letters))
            requests.append(Request(prefix + encode(text_prompt(question)), texts))
        return requests
