"""Suite "next_token": accuracy at positions of a corpus, predicted directly and after reasoning (paper, section 4.1).

Both are read by the same rules, so that they can be compared. Under the prefix rule (Equation 3), a prediction is right if its
bytes are one or more whole tokens of the continuation; the direct prediction counts as if it were written in a box. Under
first-token matching (Appendix A), the first predicted token must be the true one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.corpus.mixture import source_name
from rpt_jax.corpus.prepared import PreparedCorpus, open_prepared
from rpt_jax.errors import UserError
from rpt_jax.evaluation.likelihood import LikelihoodScorer, Request, collect
from rpt_jax.evaluation.next_token import by_difficulty, choose_evaluation_set
from rpt_jax.evaluation.predictions import Prediction, direct_prediction, read_prediction
from rpt_jax.evaluation.statistics import majority_correct, pass_at_k, powers_of_two
from rpt_jax.evaluation.stored_results import Record
from rpt_jax.evaluation.suite import SUITES, SuiteInputs, measures, scores_of
from rpt_jax.infra.digest import digest
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position, choose_positions
from rpt_jax.registry import TARGETS
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.rollout.sampler import EVALUATION_STEP, Sampler
from rpt_jax.setup import load_starting_policy, open_or_prepare_corpus

_CONTEXT_CHARACTERS = 400  # Of the text before a position that its record has, from the end.
RULES = ("prefix", "first_token")


@SUITES.register("next_token")
class NextTokenSuite:
    """Next-token accuracy at positions of a corpus: direct, and by reasoning."""

    def __init__(self, inputs: SuiteInputs):
        """
        Args:
          inputs: the policy, and the config that names the corpus.

        Raises: UserError, if targets are segments, or if the corpus cannot be used or has no position to evaluate.
        """
        experiment = inputs.experiment
        targets = experiment.data.targets
        if TARGETS[targets].requirements.segments:
            raise UserError(
                f"--suite=next_token evaluates predictions of the next token, and data.targets='{targets}' asks for segments: "
                "give a config of next tokens. A run with segments evaluates them itself, before, during and after training.",
                field="data.targets",
            )
        self._tokenizer = inputs.tokenizer
        self._reading = experiment.prompt.box_reading
        self._reference_bytes = experiment.prompt.reference_bytes
        self._batch = experiment.training.prompts_per_step
        prepared = open_corpus(inputs)
        self._corpus_fingerprint = prepared.fingerprint
        split = experiment.evaluation.split
        self._windows = prepared.corpus.windows(split)
        self._cluster_W = prepared.corpus.clusters(split)
        self._builder = PromptBuilder(experiment.prompt, inputs.tokenizer)
        self._set = choose_evaluation_set(
            self._builder,
            self._windows,
            self._choose_positions(inputs, prepared),
            count=experiment.evaluation.positions,
            batch=self._batch,
            seed=experiment.data.seed,
        )
        self._sample = Sampler(experiment, inputs.policy, inputs.tokenizer, inputs.mesh, self._builder)
        self._weights = self._sample.weights(inputs.params)
        self._scorer = LikelihoodScorer(
            inputs.policy,
            inputs.params,
            inputs.mesh,
            tokens_per_pass=experiment.data.score_batch_windows * experiment.data.max_document_tokens,
            logit_chunk_tokens=experiment.training.logit_chunk_tokens,
        )

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(self._set.batches)

    @property
    def fingerprint(self) -> str:
        """Digest of the corpus and the positions."""
        return digest(self._corpus_fingerprint, self._set.positions)

    def launch(self, batch: int) -> Any:
        """Start to sample predictions, and to score the true tokens without reasoning."""
        _, rollouts, _ = self._sample.launch(self._weights, self._set.batches[batch], EVALUATION_STEP)
        direct = self._scorer.launch(self._direct_requests(batch))
        return {"rollouts": rollouts, "direct": direct.arrays, "rows": direct.indices}

    def verify(self, batch: int, arrays: Any) -> Callable[[], list[Record]]:
        """Read the predictions at each position of a batch, and find which of them are right."""
        direct = collect(self._direct_requests(batch), arrays["rows"], arrays["direct"])
        rollouts = arrays["rollouts"]
        responses = responses_of(rollouts)
        records = []
        for p, position in enumerate(self._positions(batch)):
            [likelihood] = direct[p]
            finished_G = rollouts.ended_PxG[p] != Ended.LENGTH
            records.append(self._record(position, likelihood, responses[p], finished_G.tolist()))
        return lambda: records

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the measures by difficulty, the log-probability of the true token, and what describes the responses."""
        positions = [Position(window=0, position=0, entropy=record["entropy"]) for record in records]
        cluster_N = np.array([record["cluster"] for record in records])
        return {
            "difficulties": {
                measure: by_difficulty(scores_of(records, measure), positions, cluster_N)
                for measure in measures(records)
            },
            "logprob": float(np.mean([record["logprob"] for record in records])),
            "format_rate": float(np.mean([p is not None for record in records for p in record["predictions"]])),
            "truncated": 1.0 - float(np.mean([record["finished"] for record in records])),
            "response_length": float(np.mean([record["lengths"] for record in records])),
        }

    def _positions(self, batch: int) -> list[Position]:
        """Return the positions of a batch, without those that pad it."""
        return self._set.positions[batch * self._batch : (batch + 1) * self._batch]

    def _direct_requests(self, batch: int) -> list[Request]:
        """Return requests for the true token at each position, given its window as the proxy reads it."""
        requests = []
        for position in self._positions(batch):
            ids = self._windows[position.window].tolist()
            requests.append(Request([self._tokenizer.bos_id, *ids[: position.position]], [[ids[position.position]]]))
        return requests

    def _record(
        self, position: Position, likelihood: Any, responses: Sequence[Sequence[int]], finished: Sequence[bool]
    ) -> Record:
        """Return the record of a position.

        Args:
          position: the position.
          likelihood: of the true token, without reasoning.
          responses: token ids of each sample.
          finished: whether each sample ended by itself.
        """
        tokenizer = self._tokenizer
        window = self._windows[position.window]
        predictions = self._predictions(responses, finished)
        [direct] = self._correct(position, [direct_prediction(likelihood.first_token, tokenizer.pieces, self._reading)])
        reasoned = self._correct(position, predictions)
        scores = {f"direct/{rule}": direct[rule] for rule in RULES}
        for rule in RULES:
            votes = [
                p.content if rule == "prefix" else (p.first_token if p.first_token >= 0 else None) for p in predictions
            ]
            scores |= _sample_scores(f"reasoning/{rule}", votes, [of_sample[rule] for of_sample in reasoned])
        return {
            "id": f"{self._windows.numbers_N[position.window]}:{position.position}",
            "category": "",
            "cluster": int(self._cluster_W[position.window] % 2**53),
            "entropy": position.entropy,
            "context": tokenizer.decode(window[: position.position])[-_CONTEXT_CHARACTERS:],
            "truth": tokenizer.pieces[window[position.position]].decode(errors="replace"),
            "logprob": likelihood.logprob,
            "direct": tokenizer.decode([likelihood.first_token]),
            "predictions": [None if p.content is None else p.content.decode(errors="replace") for p in predictions],
            "correct": [of_sample["prefix"] for of_sample in reasoned],
            "first_token_correct": [of_sample["first_token"] for of_sample in reasoned],
            "finished": list(finished),
            "lengths": [len(response) for response in responses],
            "responses": [tokenizer.decode(response) for response in responses],
            "scores": scores,
        }

    def _predictions(self, responses: Sequence[Sequence[int]], finished: Sequence[bool]) -> list[Prediction]:
        """Return what each response predicts, given its token ids and whether it ended by itself."""
        tokenizer = self._tokenizer
        return [
            read_prediction(response, tokenizer.pieces, tokenizer.end_think_id, is_finished, self._reading)
            for response, is_finished in zip(responses, finished, strict=True)
        ]

    def _correct(self, position: Position, predictions: Sequence[Prediction]) -> list[dict[str, float]]:
        """Return by rule whether each prediction at a position is right, 0 or 1."""
        ids = self._windows[position.window][position.position :].tolist()
        continuation = self._continuation(ids)
        return [
            {
                "prefix": float(prediction.is_right(continuation)),
                "first_token": float(prediction.first_token == ids[0]),
            }
            for prediction in predictions
        ]

    def _continuation(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of the first tokens that fit in `prompt.reference_bytes`; a longer prediction is wrong."""
        pieces = [self._tokenizer.pieces[token] for token in ids]
        ends = itertools.accumulate(map(len, pieces))
        # A special token has no bytes, so no prediction can match it or anything after it.
        kept = itertools.takewhile(
            lambda pair: pair[0] and pair[1] <= self._reference_bytes, zip(pieces, ends, strict=True)
        )
        return [piece for piece, _ in kept]

    def _choose_positions(self, inputs: SuiteInputs, prepared: PreparedCorpus) -> list[Position]:
        """Return the positions of the easiest difficulty under the proxy, which include the others. Raises: UserError."""
        data = inputs.experiment.data
        stored = [prepared.scores[int(number)] for number in self._windows.numbers_N]
        positions, left_out = choose_positions(
            self._windows,
            [record[0 if data.entropy_renormalized else 1] for record in stored],
            boxable_tokens(inputs.tokenizer.byte_vocab, inputs.experiment.prompt),
            min(DIFFICULTIES.values()),
            data.min_context,
        )
        if not positions:
            raise UserError(
                f"{source_name(data)}: the {len(self._windows)} windows of evaluation.split="
                f"'{inputs.experiment.evaluation.split}' have no position above {min(DIFFICULTIES.values())} nats to evaluate, "
                f"and {left_out} that no box can hold. Choose another split, or another corpus.",
                field="evaluation.split",
            )
        return positions


def responses_of(rollouts: Rollouts) -> list[list[list[int]]]:
    """Return the token ids of the G responses to each of P prompts, given rollouts on the host."""
    return [
        [tokens_T[:length].tolist() for tokens_T, length in zip(tokens_GxT, lengths_G, strict=True)]
        for tokens_GxT, lengths_G in zip(rollouts.tokens_PxGxT, rollouts.lengths_PxG, strict=True)
    ]


def open_corpus(inputs: SuiteInputs) -> PreparedCorpus:
    """Open the corpus of `data.prepared` or, without one, prepare the corpus of the config with the config's own policy.

    So the positions do not depend on the policy that is evaluated, and two policies are evaluated at the same ones.

    Raises: UserError, if the corpus cannot be used, or if the policies have different tokenizers.
    """
    experiment = inputs.experiment
    if experiment.data.prepared:
        return open_prepared(experiment.data, inputs.tokenizer, Path(experiment.data.prepared))
    proxy, params, tokenizer = load_starting_policy(experiment.policy, inputs.mesh)
    if tokenizer.fingerprint != inputs.tokenizer.fingerprint:
        raise UserError(
            f"the evaluated policy has another tokenizer ({inputs.tokenizer.source}) than policy.path="
            f"'{experiment.policy.path}', whose entropies choose the positions. Set policy.path to a policy with the same "
            "tokenizer.",
            field="policy.path",
        )
    return open_or_prepare_corpus(experiment, proxy, params, tokenizer, inputs.mesh, inputs.workdir, inputs.context)


def _sample_scores(name: str, votes: Sequence[Any], correct: Sequence[float]) -> dict[str, float]:
    """Return random@1, pass@k and the majority vote of the samples at one position, by the name of the measure.

    Args:
      name: of the predictions and the rule.
      votes: what each sample predicts; None for nothing.
      correct: whether each is right, 0 or 1.
    """
    scores = {f"{name}/random@1": float(np.mean(correct))}
    for k in powers_of_two(len(correct))[1:]:
        scores[f"{name}/pass@{k}"] = float(pass_at_k(np.array([correct]), k)[0])
    return scores | {f"{name}/majority": majority_correct(votes, correct)}
