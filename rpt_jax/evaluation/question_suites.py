"""Suites that ask questions: "questions" with a verifier, and multiple choice by a boxed letter or by likelihood."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
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
from rpt_jax.evaluation.questions import QuestionSampling, SampledQuestions, VerifiedQuestions, status_shares
from rpt_jax.evaluation.statistics import majority_correct, pass_at_k, powers_of_two
from rpt_jax.evaluation.stored_results import Record
from rpt_jax.evaluation.suite import SUITES, SuiteInputs
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.question_prompts import question_text, questions_fingerprint, tokenize_questions
from rpt_jax.questions.loading import QuestionSets, load_questions
from rpt_jax.questions.question import Question
from rpt_jax.rewards.verified import REJECTED_QUESTIONS, BatchVerifier
from rpt_jax.rewards.verifiers import why_unreadable
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def question_sampling(
    inputs: SuiteInputs, sets: QuestionSets, text_of: Callable[[Question], str], template: str, slot: str
) -> QuestionSampling:
    """Return what responses to test questions are sampled with.

    Args:
      inputs: the policy, and the config, whose section `rollout` says how responses are sampled.
      sets: the questions.
      text_of: returns the text that stands in the prompt for a question.
      template: prompt template.
      slot: what the template has braces around.

    Raises: UserError, if all questions are too long for a prompt.
    """
    experiment = inputs.experiment
    builder = PromptBuilder(dataclasses.replace(experiment.prompt, template=template), inputs.tokenizer, slot)
    return QuestionSampling(
        sample=Sampler(experiment, inputs.policy, inputs.tokenizer, inputs.mesh, builder),
        questions=tokenize_questions(sets.test, builder, inputs.tokenizer, "test", text_of),
        builder=builder,
        batch=experiment.training.prompts_per_step,
    )


def response_texts(tokenizer: Tokenizer, rollouts: Rollouts, p: int) -> list[str]:
    """Return the text of each response to the question in row p."""
    responses = zip(rollouts.tokens_PxGxT[p], rollouts.lengths_PxG[p], strict=True)
    return [tokenizer.decode(tokens_T[:length]) for tokens_T, length in responses]


def response_summary(
    sampling: QuestionSampling, rejected: Mapping[str, int], records: Sequence[Record]
) -> dict[str, Any]:
    """Return the numbers of questions left out or rejected, the share of truncated responses and the mean length."""
    return {
        "left_out": sampling.questions.left_out,
        "rejected": rejected,
        "truncated": 1.0 - float(np.mean([record["finished"] for record in records])),
        "response_length": float(np.mean([record["lengths"] for record in records])),
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


def sample_scores(score: Sequence[float], correct: Sequence[float]) -> dict[str, float]:
    """Return avg@k of the samples to a question ("accuracy" if there is only one), and pass@k for k = 2, 4, … up to all of them.

    Args:
      score: of each sample, in [0, 1].
      correct: whether each sample is correct, 0 or 1.
    """
    samples = len(correct)
    scores = {"accuracy" if samples == 1 else f"avg@{samples}": float(np.mean(score))}
    for k in powers_of_two(samples)[1:]:
        scores[f"pass@{k}"] = float(pass_at_k(np.array([correct]), k)[0])
    return scores


@SUITES.register("questions", questions=True)
class QuestionSuite(VerifiedQuestions):
    """Questions with verifiable answers: avg@k and pass@k with the verifier of `questions.verifier`."""

    def __init__(self, inputs: SuiteInputs):
        """
        Args:
          inputs: the policy, and the config that names the questions and their verifier.

        Raises: UserError, if the questions, the verifier or the prompts cannot be used.
        """
        experiment = inputs.experiment
        sets = load_test_questions(inputs, functools.partial(why_unreadable, experiment.questions.verifier))
        self._rejected = sets.rejected
        self._tokenizer = inputs.tokenizer
        sampling = question_sampling(inputs, sets, question_text, experiment.prompt.template, "question")
        super().__init__(sampling, inputs.params, BatchVerifier(experiment.questions, inputs.tokenizer))

    def verify(self, batch: int, arrays: Rollouts) -> Callable[[], list[Record]]:
        """Start to verify the responses to the questions of a batch."""
        verified = super().verify(batch, arrays)

        def records() -> list[Record]:
            return [
                {
                    **question_fields(question),
                    **record,
                    "responses": response_texts(self._tokenizer, arrays, p),
                    "scores": sample_scores(record["score"], record["correct"]),
                }
                for p, (question, record) in enumerate(zip(self.of_batch(batch), verified(), strict=True))
            ]

        return records

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the share of each outcome, of truncated responses, and the mean length."""
        return response_summary(self._sampling, self._rejected, records) | {"status": status_shares(records)}

    def close(self) -> None:
        """End the worker processes of the verifier."""
        self._verify.close()


@SUITES.register("multiple_choice", questions=True, sampling=multiple_choice_experiment)
class MultipleChoiceSuite(SampledQuestions):
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
        self._tokenizer = inputs.tokenizer
        sets = load_test_questions(inputs, why_unusable)
        self._rejected = sets.rejected
        super().__init__(question_sampling(inputs, sets, boxed_letter_text, "plain", "context"), inputs.params)

    def verify(self, batch: int, arrays: Rollouts) -> Callable[[], list[Record]]:
        """Read the letters of the responses to the questions of a batch."""
        records = [self._record(question, arrays, p) for p, question in enumerate(self.of_batch(batch))]
        return lambda: records

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the shares of unparsed responses, of letters that are no option and of truncated responses, and the length."""
        letters = [(letter, record["options"]) for record in records for letter in record["letters"]]
        return response_summary(self._sampling, self._rejected, records) | {
            "unparsed": float(np.mean([letter is None for letter, _ in letters])),
            "not_an_option": float(np.mean([bool(letter) and letter not in options for letter, options in letters])),
        }

    def _record(self, question: Question, rollouts: Rollouts, p: int) -> Record:
        """Return the record of the question in row p, given the responses to all."""
        responses = response_texts(self._tokenizer, rollouts, p)
        letters = [read_letter(response) for response in responses]
        counted = list(letters)
        if self._protocol.unparsed == "random":
            counted = [letter or random_letter(question, sample, self._seed) for sample, letter in enumerate(letters)]
        correct = [float(letter in question.answers) for letter in counted]
        scores = sample_scores(correct, correct)
        if len(correct) > 1:
            scores["majority"] = majority_correct(counted, correct)
        return {
            **question_fields(question),
            "options": LETTERS[: len(question.choices)],
            "letters": letters,
            "correct": correct,
            "finished": (rollouts.ended_PxG[p] != Ended.LENGTH).tolist(),
            "lengths": rollouts.lengths_PxG[p].tolist(),
            "responses": responses,
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

    def verify(self, batch: int, arrays: Any) -> Callable[[], list[Record]]:
        """Find the most likely option of each question by each measure."""
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
        return lambda: records

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
