"""Suite "altered_reasoning": do predictions depend on what the reasoning says, or is its format enough? A causal check.

A policy samples responses at the positions of the suite "next_token". The reasoning of each is then replaced and ended with
`</think>`, and the policy samples its prediction again. If predictions after altered reasoning are as good as those after its
own, the content of the reasoning does no work.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.config.derived import evaluation_experiment
from rpt_jax.distributed.processes import to_host
from rpt_jax.errors import UserError
from rpt_jax.evaluation.next_token_suite import RULES, NextTokenSuite, responses_of
from rpt_jax.evaluation.statistics import compare
from rpt_jax.evaluation.stored_results import Record
from rpt_jax.evaluation.suite import SUITES, SuiteInputs, clusters_of, scores_of
from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler
from rpt_jax.tokenizers.tokenizer import END_THINK, THINK, Tokenizer


class Alteration(enum.StrEnum):
    """What replaces the reasoning of a response."""

    OWN = "own"
    """The same reasoning: the control, in which only the prediction is sampled again."""
    EMPTY = "empty"
    """Nothing."""
    SHUFFLED = "shuffled"
    """The same tokens in random order."""
    OTHER = "other"
    """The reasoning at a position of another document."""


class Reasoning(NamedTuple):
    """The reasoning of a response.

    Attributes:
      opening: token ids of `<think>`, if the response begins with it.
      content: token ids between that and `</think>`, or the end of a response without `</think>`.
    """

    opening: list[int]
    content: list[int]


def split_reasoning(response: Sequence[int], tokenizer: Tokenizer) -> Reasoning:
    """Return the reasoning of a response, up to its last `</think>`.

    Args:
      response: token ids, without padding.
      tokenizer: its tokenizer. A marker is its special token, or bytes.
    """
    text = b"".join(tokenizer.pieces[token] for token in response)
    ends = list(itertools.accumulate(len(tokenizer.pieces[token]) for token in response))

    # Find the tokens in front of the last marker. Without one, only a stop token does not belong to the reasoning.
    markers = [i for i, token in enumerate(response) if token == tokenizer.end_think_id]
    if (place := text.rfind(END_THINK.encode())) >= 0:
        markers.append(bisect.bisect_right(ends, place))
    end = max(markers, default=len(response) - (response[-1] in tokenizer.stop_ids))

    start = 0
    if response[0] == tokenizer.think_id:
        start = 1
    elif text.startswith(THINK.encode()):
        start = bisect.bisect_right(ends, len(THINK))
    return Reasoning(opening=list(response[:start]), content=list(response[start:end]))


def end_prompts_with(
    prompts: PromptBatch, reasoning_P: Sequence[Reasoning], tokenizer: Tokenizer, max_new_tokens: int
) -> PromptBatch:
    """Return prompts of S + `max_new_tokens` tokens that end with reasoning and `</think>`.

    Args:
      prompts: P prompts of S tokens.
      reasoning_P: the reasoning after each.
      tokenizer: gives the tokens of `</think>`.
      max_new_tokens: of a response. Reasoning that leaves no room for `</think>` in it loses its last tokens.
    """
    marker = tokenizer.end_think_ids
    tokens_PxS = np.pad(prompts.tokens_PxS, ((0, 0), (0, max_new_tokens)))
    lengths_P = prompts.lengths_P.copy()
    for p, (opening, content) in enumerate(reasoning_P):
        added = [*[*opening, *content][: max_new_tokens - len(marker)], *marker]
        tokens_PxS[p, lengths_P[p] : lengths_P[p] + len(added)] = added
        lengths_P[p] += len(added)
    return prompts._replace(tokens_PxS=tokens_PxS, lengths_P=lengths_P)


def altered_sampling(experiment: Experiment) -> Experiment:
    """Return an experiment whose `rollout` says how responses are sampled, with prompts that have room for reasoning.

    So memory is planned for prompts that end with reasoning.
    """
    sampled = evaluation_experiment(experiment)
    longer = sampled.prompt.max_tokens + sampled.rollout.max_new_tokens
    return dataclasses.replace(sampled, prompt=dataclasses.replace(sampled.prompt, max_tokens=longer))


@SUITES.register("altered_reasoning", sampling=altered_sampling)
class AlteredReasoningSuite(NextTokenSuite):
    """Next-token accuracy after the reasoning that a policy sampled, and after altered reasoning."""

    def __init__(self, inputs: SuiteInputs):
        """
        Args:
          inputs: the policy, and the config that names the corpus, from `altered_sampling`.

        Raises: UserError, as `NextTokenSuite` does, or if all positions of a batch are of one document.
        """
        experiment = inputs.experiment
        rollout = experiment.rollout
        self._samples = rollout.samples_per_prompt
        self._max_new_tokens = rollout.max_new_tokens
        prompt = dataclasses.replace(experiment.prompt, max_tokens=experiment.prompt.max_tokens - self._max_new_tokens)
        super().__init__(inputs._replace(experiment=dataclasses.replace(experiment, prompt=prompt)))
        self._donors = [self._choose_donors(batch) for batch in range(self.count)]
        self._seed = experiment.seed
        self._predict = Sampler(
            dataclasses.replace(experiment, rollout=dataclasses.replace(rollout, samples_per_prompt=1)),
            inputs.policy,
            inputs.tokenizer,
            inputs.mesh,
            self._builder,
            answers=True,
        )

    def launch(self, batch: int) -> Any:
        """Sample responses, wait for them, and start to sample predictions after altered reasoning."""
        arrays = super().launch(batch)
        reasoning_PxG = [
            [split_reasoning(response, self._tokenizer) for response in of_prompt]
            for of_prompt in responses_of(to_host(arrays["rollouts"]))
        ]
        predictions = {
            alteration.value: [
                self._launch_predictions(batch, sample, self._alter(batch, alteration, reasoning_P, sample))
                for sample, reasoning_P in enumerate(zip(*reasoning_PxG, strict=True))
            ]
            for alteration in Alteration
        }
        return arrays | {"predictions": predictions}

    def verify(self, batch: int, arrays: Any) -> Callable[[], list[Record]]:
        """Read the predictions of the responses, and those after altered reasoning."""
        records = super().verify(batch, arrays)()
        marker = self._tokenizer.end_think_ids
        for alteration in Alteration:
            samples = arrays["predictions"][alteration.value]
            answers_GxP = [[[*marker, *answer] for [answer] in responses_of(rollouts)] for rollouts in samples]
            finished_GxP = [(rollouts.ended_PxG[:, 0] != Ended.LENGTH).tolist() for rollouts in samples]
            for p, (position, record) in enumerate(zip(self._positions(batch), records, strict=True)):
                predictions = self._predictions([row[p] for row in answers_GxP], [row[p] for row in finished_GxP])
                correct = self._correct(position, predictions)
                for rule in RULES:
                    record["scores"][f"{alteration}/{rule}"] = float(
                        np.mean([of_sample[rule] for of_sample in correct])
                    )
        return lambda: records

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the summary of `NextTokenSuite`, and by how much each alteration changes the accuracy by the prefix rule."""
        own_N = scores_of(records, f"{Alteration.OWN}/prefix")
        differences = {}
        for alteration in Alteration:
            if alteration != Alteration.OWN:
                altered_N = scores_of(records, f"{alteration}/prefix")
                comparison = compare(own_N, altered_N, [""] * len(records), clusters_of(records))
                differences[f"{alteration} minus own"] = {
                    "mean": comparison.difference,
                    "low": comparison.low,
                    "high": comparison.high,
                }
        return super().summary(records) | {"differences": differences}

    def _choose_donors(self, batch: int) -> list[int]:
        """Return for each prompt of a batch another one, of another document. Raises: UserError, if there is none."""
        windows = self._set.batches[batch].window_P.tolist()
        document_P = self._cluster_W[windows]
        if len(set(document_P.tolist())) == 1:
            raise UserError(
                f"all {len(self._positions(batch))} positions of batch {batch + 1} of {self.count} are of one document, and "
                "--suite=altered_reasoning exchanges reasoning between documents: choose evaluation.positions="
                f"{len(self._set.positions)} as a multiple of the {self._batch} prompts of a batch, or larger batches with "
                "evaluation.prompts_per_batch.",
                field="evaluation.positions",
            )
        count = len(windows)
        # Half a batch away, because neighbors are often of the same document.
        return [
            next(
                donor
                for donor in ((p + count // 2 + i) % count for i in range(count))
                if document_P[donor] != document_P[p]
            )
            for p in range(count)
        ]

    def _alter(
        self, batch: int, alteration: Alteration, reasoning_P: Sequence[Reasoning], sample: int
    ) -> list[Reasoning]:
        """Return the reasoning that replaces that of one sample of each prompt of a batch."""
        if alteration == Alteration.EMPTY:
            return [reasoning._replace(content=[]) for reasoning in reasoning_P]
        if alteration == Alteration.SHUFFLED:
            ids_P = self._set.batches[batch].ids_P.tolist()
            return [
                reasoning._replace(
                    content=np.random.default_rng([self._seed, prompt, sample]).permutation(reasoning.content).tolist()
                )
                for prompt, reasoning in zip(ids_P, reasoning_P, strict=True)
            ]
        if alteration == Alteration.OTHER:
            return [
                reasoning._replace(content=reasoning_P[donor].content)
                for donor, reasoning in zip(self._donors[batch], reasoning_P, strict=True)
            ]
        return list(reasoning_P)

    def _launch_predictions(self, batch: int, sample: int, reasoning_P: Sequence[Reasoning]) -> Rollouts:
        """Start to sample a prediction after each prompt of a batch and its reasoning, of the sample with a number.

        The noise of a sample is the same after each alteration.
        """
        prompts = end_prompts_with(self._set.batches[batch], reasoning_P, self._tokenizer, self._max_new_tokens)
        ids_P = prompts.ids_P * self._samples + sample
        _, rollouts, _ = self._predict.launch(self._weights, prompts._replace(ids_P=ids_P), EVALUATION_STEP)
        return rollouts
