"""The positions that a run trains on: chosen by the entropies of the proxy or of the current policy, in a shuffled order."""

from __future__ import annotations

import base64
import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rpt_jax.config import DataConfig, Experiment
from rpt_jax.corpus.entropy import Scores, stored_entropies
from rpt_jax.corpus.mixture import parse_mixture, source_name
from rpt_jax.corpus.prepared import PreparedCorpus
from rpt_jax.corpus.tokenized import Windows
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.pipeline import PositionOrder, PromptStream, ShuffledEpochs, position_order
from rpt_jax.prompts.positions import Entropies, PositionIndex, index_positions, read_in_blocks
from rpt_jax.prompts.targets import Segments
from rpt_jax.registry import POSITION_CHOICES, position_fields

logger = logging.getLogger(__name__)

# Scores windows with the current policy; takes the token ids of each.
ScoreFn = Callable[[Sequence[Any]], list[Scores]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEntropies:
    """Entropies of a sample of training windows under the current policy.

    Attributes:
      windows_M: uint32, the sampled windows in ascending order, as indices into the training windows.
      records: entropies by record number, as a prepared corpus stores them for the proxy (`corpus.store.RECORD_DTYPES`).
      tokens: number of tokens that were scored.
    """

    windows_M: np.ndarray
    records: Mapping[int, tuple[np.ndarray, ...]]
    tokens: int

    def state(self) -> dict[str, Any]:
        """Return the state for `from_state`, as JSON values."""
        entropies_2xT = np.concatenate([np.stack(record) for record in self.records.values()], axis=1, dtype="<f4")
        return {
            "windows": self.windows_M.tolist(),
            "record_numbers": [*self.records],
            "lengths": [len(record[0]) for record in self.records.values()],
            "entropies": base64.b64encode(entropies_2xT.tobytes()).decode(),
            "tokens": self.tokens,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PolicyEntropies:
        """Restore what `state` returned."""
        entropies_2xT = np.frombuffer(base64.b64decode(state["entropies"]), "<f4").reshape(2, -1)
        windows_2xS = np.split(entropies_2xT, np.cumsum(state["lengths"])[:-1], axis=1)
        records = {
            number: tuple(entropies) for number, entropies in zip(state["record_numbers"], windows_2xS, strict=True)
        }
        return cls(windows_M=np.array(state["windows"], np.uint32), records=records, tokens=state["tokens"])


def training_stream(
    experiment: Experiment,
    prepared: PreparedCorpus,
    windows: Windows,
    boxable_V: np.ndarray,
    builder: PromptBuilder,
    segments: Segments | None = None,
) -> PromptStream:
    """Return the stream of training prompts, chosen by the proxy's entropies.

    Args:
      experiment: the config.
      prepared: the corpus with the proxy's entropies.
      windows: its training windows.
      boxable_V: bool, the tokens that a box can hold.
      builder: builds the prompt of a position.
      segments: finds the segments of a window, if they are the targets.

    Raises: UserError, if there are too few positions for a step.
    """
    if segments:
        _report_segments_left_out(experiment, prepared, windows, segments)
    else:
        _report_tokens_left_out(experiment, prepared, windows, boxable_V)
    return PromptStream(
        builder,
        windows,
        training_orders(experiment, prepared, windows, boxable_V, segments=segments),
        batch=experiment.training.prompts_per_step,
        workers=experiment.data.workers,
    )


def _report_tokens_left_out(
    experiment: Experiment, prepared: PreparedCorpus, windows: Windows, boxable_V: np.ndarray
) -> None:
    """Log how many training positions are left out because no box can hold their next token."""
    entropies = Entropies(prepared.scores, prepared.corpus.tokens, boxable_V)
    left_out = entropies.count_left_out(windows.numbers_N, experiment.data.min_context)
    if left_out:
        total = prepared.corpus.token_count("train")
        logger.info(
            f"{left_out:,} of {total:,} training positions ({left_out / total:.2%}) are left out: no box can hold their next "
            f"token, as prompt.box_reading='{experiment.prompt.box_reading}' reads it."
        )


def _report_segments_left_out(
    experiment: Experiment, prepared: PreparedCorpus, windows: Windows, segments: Segments
) -> None:
    """Log how many segments of the training windows cannot be targets, and why."""
    counts: collections.Counter[str] = collections.Counter()
    for ids, _ in read_in_blocks(prepared.corpus.tokens, windows.numbers_N):
        counts += segments.count_left_out(ids, experiment.data.min_context)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    logger.info(
        f"{counts.total():,} segments of training windows are left out{': ' if reasons else ''}{reasons} "
        f"(data.targets='{experiment.data.targets}', prompt.box_reading='{experiment.prompt.box_reading}')."
    )


def training_orders(
    experiment: Experiment,
    prepared: PreparedCorpus,
    windows: Windows,
    boxable_V: np.ndarray,
    policy_entropies: PolicyEntropies | None = None,
    segments: Segments | None = None,
) -> list[PositionOrder]:
    """Return an infinite order of the training positions that `data.positions` chooses, for each stage of training.

    Args:
      experiment: the config.
      prepared: the corpus with the proxy's entropies.
      windows: its training windows.
      boxable_V: bool, the tokens that a box can hold.
      policy_entropies: if given, positions are chosen by these instead, among the windows that they cover.
      segments: finds the segments of a window, if they are the targets.

    Raises: UserError, if there are too few positions for a step.
    """
    data = experiment.data
    training = experiment.training

    # Choose the positions of every stage.
    if policy_entropies is not None:
        stored = policy_entropies.records
        windows_M = policy_entropies.windows_M
        total = policy_entropies.tokens
        scored_by = "the current policy"
    else:
        stored = prepared.scores
        windows_M = None
        total = prepared.corpus.token_count("train")
        scored_by = "the proxy"
    entropies = Entropies(stored, prepared.corpus.tokens, boxable_V, segments)
    stages = index_positions(data, entropies, windows.numbers_N, windows_M)
    found = sum(map(len, stages))

    # Split every stage into the parts of the mixture.
    weights, part_W = _mixture(data, prepared, windows)
    parts_of_stages = [
        [stage.restrict_to(part_W == part) for part in range(len(weights))] or [stage] for stage in stages
    ]

    # Every stage and part must fill at least one batch.
    smallest, stage, part = min(
        (len(positions), stage, part)
        for stage, parts in enumerate(parts_of_stages)
        for part, positions in enumerate(parts)
    )
    if smallest < training.prompts_per_step:
        places = [f"part '{parse_mixture(data.path)[part][1]}' of the mixture"] if weights else []
        places += [f"stage {stage + 1} of {len(stages)}"] if len(stages) > 1 else []
        where = f"{', '.join(places)} has " if places else ""
        begin = f" begin a target of data.targets='{data.targets}'," if segments else ""
        raise UserError(
            f"{source_name(data)}: {where}only {smallest:,} training positions that{begin} are chosen by "
            f"{position_fields(data)} and have data.min_context={data.min_context} tokens before them, of {found:,} in all and "
            f"{total:,} training tokens; training.prompts_per_step={training.prompts_per_step} needs at least as many. "
            "Change one of these fields, or use more text.",
            field="data.targets" if segments and not found else "data.path" if weights else "training.prompts_per_step",
        )
    if not weights and policy_entropies is None:
        _warn_of_small_parts(data, stages, part_W, training.prompts_per_step)
    logger.info(
        f"{found:,} of {total:,} training positions are chosen by {position_fields(data)}, with the entropies of {scored_by} "
        f"over its {data.entropy_top_k} most likely tokens."
    )
    return [
        position_order(
            parts,
            weights,
            batch=training.prompts_per_step,
            per_window=data.positions_per_window,
            seed=(experiment.seed, stage),
        )
        for stage, parts in enumerate(parts_of_stages)
    ]


def _warn_of_small_parts(data: DataConfig, stages: Sequence[PositionIndex], part_W: np.ndarray, needed: int) -> None:
    """Name the parts of a mixture without weights that have fewer positions than the `needed` ones of a step."""
    mixture = parse_mixture(data.path) if data.source == "path" else []
    for part, (_, path) in enumerate(mixture):
        count = sum(len(stage.restrict_to(part_W == part)) for stage in stages)
        if len(mixture) > 1 and count < needed:
            logger.warning(
                "data.path: part '%s' of the mixture has only %s training positions, fewer than the %s of a step.",
                path,
                f"{count:,}",
                f"{needed:,}",
            )


def training_stage(step: int, total_steps: int, stages: int) -> int:
    """Return the stage of a training step: each of them lasts equally many steps.

    Args:
      step: from 1.
      total_steps: number of steps of the run.
      stages: number of stages.
    """
    return min((step - 1) * stages // total_steps, stages - 1)


def rescoring_is_due(experiment: Experiment, step: int) -> bool:
    """Return whether positions are chosen again, by the current policy's entropies, before `step`.

    The first `data.rescore_every_steps` steps use the proxy's entropies.
    """
    rescored = POSITION_CHOICES[experiment.data.positions].requirements.rescored
    return rescored and step > 1 and (step - 1) % experiment.data.rescore_every_steps == 0


def score_sample(
    experiment: Experiment, prepared: PreparedCorpus, windows: Windows, score: ScoreFn, step: int
) -> PolicyEntropies:
    """Score `data.rescore_windows` training windows with the current policy before `step`, or all if there are no more.

    Every part of a mixture gives the same number of windows. They are a function of (seed, number of earlier samples): each
    part is visited in a shuffled order, which is shuffled anew when all its windows have been sampled.

    Args:
      experiment: the config.
      prepared: the corpus.
      windows: its training windows.
      score: scores windows with the current policy.
      step: the step before which `rescoring_is_due`, from 1.
    """
    data = experiment.data
    weights, part_W = _mixture(data, prepared, windows)
    num_parts = max(1, len(weights))
    per_part = max(1, data.rescore_windows // num_parts)
    earlier_samples = (step - 1) // data.rescore_every_steps - 1

    # Sample windows.
    sampled = []
    for part in range(num_parts):
        of_part = np.flatnonzero(part_W == part) if weights else np.arange(len(windows))
        order = ShuffledEpochs(range(len(of_part)), (experiment.seed, part))
        size = min(per_part, len(of_part))
        indices = np.array([order[i] for i in range(earlier_samples * size, (earlier_samples + 1) * size)], np.int64)
        sampled.append(of_part[np.unique(indices)])
    windows_M = np.sort(np.concatenate(sampled)).astype(np.uint32)

    # Score them. Special tokens are those without bytes.
    record_numbers_M = windows.numbers_N[windows_M]
    rows = [prepared.corpus.tokens[int(number)] for number in record_numbers_M]
    scores = score([ids for ids, _ in rows])
    records = {
        int(number): stored_entropies(window_scores, lengths)
        for number, window_scores, (_, lengths) in zip(record_numbers_M, scores, rows, strict=True)
    }
    return PolicyEntropies(windows_M=windows_M, records=records, tokens=sum(len(ids) for ids, _ in rows))


def _mixture(data: DataConfig, prepared: PreparedCorpus, windows: Windows) -> tuple[list[float], np.ndarray]:
    """Return the weights of the mixture's parts, [] for a corpus of one part, and the part of each training window."""
    corpus = prepared.corpus
    weights = [weight for weight, _ in parse_mixture(data.path) if weight] if data.source == "path" else []
    return weights, corpus.mixture_part_D[corpus.document_W[windows.numbers_N]]
