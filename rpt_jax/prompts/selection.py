"""The prompts that a run trains on: which positions, chosen by whose entropies, and in which order."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from rpt_jax.config import DataConfig, Experiment
from rpt_jax.corpus.entropy import Scorer, stored_entropies
from rpt_jax.corpus.files import parse_mixture
from rpt_jax.corpus.sources import source_name
from rpt_jax.errors import UserError
from rpt_jax.model.transformer import Params
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.pipeline import PromptStream, position_order
from rpt_jax.prompts.positions import STAGES, index_positions
from rpt_jax.registry import POSITION_CHOICES
from rpt_jax.setup import Setup


class OwnEntropies(NamedTuple):
    """What the policy as it is now makes of some of the training documents.

    Attributes:
      documents_M: uint32, which of them.
      records: by their numbers in the corpus what a prepared one has of the proxy's, see `corpus.store.RECORD_DTYPES`.
      tokens: how many were scored.
    """

    documents_M: np.ndarray
    records: Mapping[int, tuple[np.ndarray, ...]]
    tokens: int

    def state(self) -> dict[str, Any]:
        """Return what `from_state` takes, as JSON can hold it."""
        rows_2xT = np.concatenate([np.stack(record) for record in self.records.values()], axis=1, dtype="<f4")
        return {
            "documents": self.documents_M.tolist(),
            "numbers": [*self.records],
            "lengths": [len(record[0]) for record in self.records.values()],
            "entropies": base64.b64encode(rows_2xT.tobytes()).decode(),
            "tokens": self.tokens,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> OwnEntropies:
        rows_2xT = np.frombuffer(base64.b64decode(state["entropies"]), "<f4").reshape(2, -1)
        parts = np.split(rows_2xT, np.cumsum(state["lengths"])[:-1], axis=1)
        records = {number: tuple(part) for number, part in zip(state["numbers"], parts, strict=True)}
        return cls(np.array(state["documents"], np.uint32), records, state["tokens"])


def training_stream(experiment: Experiment, setup: Setup, builder: PromptBuilder) -> PromptStream:
    """Prompts at the positions of the training documents that `data.positions` names. Raises: UserError."""
    batch, workers = experiment.training.prompts_per_step, experiment.data.workers
    return PromptStream(builder, setup.train, training_order(experiment, setup), batch=batch, workers=workers)


def training_order(experiment: Experiment, setup: Setup, own: OwnEntropies | None = None) -> grain.MapDataset:
    """The positions that `data.positions` names, without end.

    Args:
      own: entropies to choose by in place of the prepared ones.

    Raises: UserError, where there are not enough for a step.
    """
    data, t, numbers_N = experiment.data, experiment.training, setup.train.numbers_N
    if own:
        stages = index_positions(data, own.records, numbers_N, own.documents_M)
        total, whose = own.tokens, "the policy's now"
    else:
        stages = index_positions(data, setup.prepared.scores, numbers_N)
        total, whose = setup.prepared.corpus.token_count("train"), "the proxy's"
    found, (weights, parts_N) = sum(map(len, stages)), _mixture(experiment, setup)
    if weights:
        stages = [stage.only(parts_N == part) for stage in stages for part in range(len(weights))]
    if min(map(len, stages)) < t.prompts_per_step:
        raise UserError(
            f"{source_name(data)}: only {found:,} of {total:,} training positions are chosen by {_rule(data)} and have "
            f"data.min_context={data.min_context} tokens before them (of every stage and part of a mixture must be enough), and "
            f"a step takes training.prompts_per_step={t.prompts_per_step}: change one of them, or give a longer corpus."
        )
    print(
        f"{found:,} of {total:,} training positions are chosen by {_rule(data)}, over {whose} {data.entropy_top_k} likeliest "
        "tokens."
    )
    return position_order(
        stages,
        weights,
        stage_prompts=t.total_steps * t.prompts_per_step // STAGES,
        batch=t.prompts_per_step,
        per_document=data.positions_per_document,
        seed=experiment.seed,
    )


def _rule(data: DataConfig) -> str:
    """The fields that choose positions, but for `data.min_context`."""
    fields = POSITION_CHOICES[data.positions].requirements.fields
    thresholded = ["entropy_threshold"] if data.positions in ("threshold", "curriculum") else []
    names = ["positions", *thresholded, *(name for name in fields if name == "keep_fraction")]
    return ", ".join(f"data.{name}={getattr(data, name)!r}" for name in names)


def refresh_is_due(experiment: Experiment, step: int) -> bool:
    """Whether positions are chosen anew before `step`; in the first steps they are those of the prepared corpus."""
    every = experiment.data.rescore_every_steps
    rescored = POSITION_CHOICES[experiment.data.positions].requirements.rescored
    return rescored and step > 1 and (step - 1) % every == 0


def own_entropies(experiment: Experiment, setup: Setup, params: Params, step: int) -> OwnEntropies:
    """Score `data.rescore_windows` training documents with the policy before `step`, of all parts of a mixture alike many.

    Which ones is a function of the seed and of how many refreshes there were: in an order of each part's own, shuffled anew
    when it is through.
    """
    data, numbers_N = experiment.data, setup.train.numbers_N
    weights, parts_N = _mixture(experiment, setup)
    count, before = data.rescore_windows // max(1, len(weights)), (step - 1) // data.rescore_every_steps - 1
    chosen = []
    for part in range(max(1, len(weights))):
        windows = np.flatnonzero(parts_N == part) if weights else np.arange(len(numbers_N))
        order = grain.MapDataset.range(len(windows)).shuffle(seed=experiment.seed).repeat()
        places = [order[i] for i in range(before * count, before * count + min(count, len(windows)))]
        chosen.append(windows[np.unique(places)])
    documents_M = np.sort(np.concatenate(chosen)).astype(np.uint32)
    rows = [setup.prepared.corpus.tokens[int(n)] for n in numbers_N[documents_M]]
    scorer = Scorer(setup.policy, params, setup.tokenizer, setup.mesh, experiment)
    scores = scorer.score([ids for ids, _ in rows])
    records = {
        int(n): stored_entropies(score, lengths)
        for n, score, (_, lengths) in zip(numbers_N[documents_M], scores, rows, strict=True)
    }
    return OwnEntropies(documents_M, records, sum(len(ids) for ids, _ in rows))


def _mixture(experiment: Experiment, setup: Setup) -> tuple[list[float], np.ndarray]:
    """The weights of a mixture's parts, where it has such, and which part each training document is of."""
    data, corpus = experiment.data, setup.prepared.corpus
    weights = [weight for weight, _ in parse_mixture(data.path) if weight] if data.source == "path" else []
    return weights, corpus.mixture_part_D[corpus.document_W[setup.train.numbers_N]]
