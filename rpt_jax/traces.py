"""Task "traces": rejection sampling. Responses of a policy that are accepted become traces, for `pretrain.traces="sampled"`.

The policy answers each prompt `rollout.samples_per_prompt` times, and at most `traces.kept_per_prompt` of the accepted responses
are kept. Every batch of prompts is a file of `prompts.sampled_traces`, so that the same command resumes after the last one.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.config.derived import sampling_fields
from rpt_jax.corpus.prepared import position_flops
from rpt_jax.distributed.processes import is_leader, to_host, wait_for_all
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.console import Progress, table
from rpt_jax.infra.digest import digest
from rpt_jax.infra.fingerprint import fingerprint_arrays
from rpt_jax.infra.overlap import finish_one_behind
from rpt_jax.infra.provenance import provenance
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.workdir import RESULT
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.prompts.question_prompts import questions_fingerprint, tokenize_questions
from rpt_jax.prompts.sampled_traces import TraceBatch, batch_path, first_distinct, read_batch, write_batch
from rpt_jax.prompts.selection import training_orders
from rpt_jax.prompts.targets import Segments, find_segments
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import match_batch
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier, load_verifiable_questions
from rpt_jax.rollout.cost import SamplingCost
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.setup import load_starting_policy, open_or_prepare_corpus
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# What the header of a batch counts, and the result sums up.
_COUNTS = ("prompts", "responses", "accepted", "solved", "kept", "prompt_tokens", "response_tokens", "flops", "seconds")


class PromptSource(Protocol):
    """Prompts, and how responses to them are judged.

    Attributes:
      accepted_by: what decides on a response.
      preparation_flops: model FLOPs that choosing the prompts took.
      fingerprint: of the windows or questions.
      rejected_questions: numbers of questions that cannot be used or repeat another one, by reason.
    """

    accepted_by: str
    preparation_flops: float
    fingerprint: str
    rejected_questions: Mapping[str, int]

    @property
    def positions(self) -> Sequence[Position]:
        """Where the responses are sampled."""
        ...

    @property
    def token_ids(self) -> Sequence[Sequence[int]]:
        """Token ids of the windows or questions that positions refer to."""
        ...

    @property
    def statuses(self) -> type[enum.IntEnum]:
        """The outcomes of a response; the one called "CORRECT" is accepted."""
        ...

    def judge(self, prompts: PromptBatch, rollouts: Rollouts) -> Callable[[], np.ndarray]:
        """Start to judge the responses to a batch of prompts; return a function that waits for their statuses, int32 [P, G]."""
        ...

    def origin(self, position: Position) -> dict[str, Any]:
        """Return what says where a prompt is from, as JSON values."""
        ...

    def close(self) -> None:
        """End the worker processes."""
        ...


class TextPositions:
    """Positions of the training windows of a corpus; accepted is what Equation 3 rewards. Methods are those of `PromptSource`."""

    accepted_by = "prefix"
    rejected_questions: Mapping[str, int] = {}
    statuses = Status

    def __init__(
        self,
        experiment: Experiment,
        policy: Transformer,
        params: Params,
        tokenizer: Tokenizer,
        segments: Segments | None,
        mesh: Mesh,
        workdir: Path,
        context: RunContext,
    ):
        """Open or prepare the corpus, and choose the positions. Raises: UserError."""
        prepared = open_or_prepare_corpus(experiment, policy, params, tokenizer, mesh, workdir, context)
        self.token_ids = windows = prepared.corpus.windows("train")
        boxable_V = boxable_tokens(tokenizer.byte_vocab, experiment.prompt)
        [order] = training_orders(experiment, prepared, windows, boxable_V, segments=segments)
        # After an epoch the order repeats positions, but each of them is used once.
        first: list[Any] = [order.positions[i] for i in range(experiment.traces.total_prompts)]
        self.positions = list({(p.window, p.position): p for p in first}.values())
        self.preparation_flops = position_flops(experiment.data, prepared)
        self.fingerprint = prepared.fingerprint
        self._mesh = mesh
        self._vocab = jax.device_put(tokenizer.byte_vocab)
        self._end_think_id = tokenizer.end_think_id
        self._box_reading = experiment.prompt.box_reading

    def judge(self, prompts: PromptBatch, rollouts: Rollouts) -> Callable[[], np.ndarray]:
        sharded = shard_prompts(prompts, self._mesh)
        _, status_PxG = match_batch(sharded, rollouts, self._vocab, self._end_think_id, self._box_reading)
        return lambda: to_host(status_PxG)

    def origin(self, position: Position) -> dict[str, Any]:
        return {"window": int(position.window), "position": int(position.position)}

    def close(self) -> None:
        pass


class TrainingQuestions:
    """Training questions; accepted is what the verifier accepts. Methods and attributes are those of `PromptSource`."""

    statuses = AnswerStatus
    preparation_flops = 0.0

    def __init__(
        self, experiment: Experiment, params: Params, tokenizer: Tokenizer, builder: PromptBuilder, workdir: Path
    ):
        """Load the questions, and start the verifiers. Raises: UserError."""
        questions = load_verifiable_questions(experiment, params, tokenizer, workdir)
        self.rejected_questions = questions.rejected
        self._prompts = tokenize_questions(questions.train, builder, tokenizer, "training")
        self.token_ids = self._prompts.token_ids
        self.positions = self._prompts.positions()[: experiment.traces.total_prompts]
        self.accepted_by = experiment.questions.verifier
        self.fingerprint = questions_fingerprint(self._prompts.questions)
        self._verify = BatchVerifier(experiment.questions, tokenizer)

    def judge(self, prompts: PromptBatch, rollouts: Rollouts) -> Callable[[], np.ndarray]:
        pending = self._verify.submit(self._prompts.of(prompts), rollouts)
        return lambda: pending.result().status_PxG

    def origin(self, position: Position) -> dict[str, Any]:
        return {"question": self._prompts.questions[position.window].id}

    def close(self) -> None:
        self._verify.close()


class JudgedBatch(NamedTuple):
    """Responses to a batch of prompts, on the host.

    Attributes:
      prompts: the prompts; the last ones of the last batch repeat its last prompt, to fill it.
      tokens_PxGxT, lengths_PxG: as of `Rollouts`.
      status_PxG: int32, of the source's `statuses`.
      flops: model FLOPs of sampling.
    """

    prompts: PromptBatch
    tokens_PxGxT: np.ndarray
    lengths_PxG: np.ndarray
    status_PxG: np.ndarray
    flops: float


def sample_traces(experiment: Experiment, workdir: Path, mesh: Mesh, context: RunContext) -> None:
    """Sample responses to `traces.total_prompts` prompts, and write those that are accepted to `workdir/traces`.

    Batches that an interrupted run has written are skipped. At the end, result.json has their totals.

    Raises: UserError, if a file is damaged or of another policy or other sampling, or the policy or the prompts cannot be used.
    """
    # Load the policy and the prompts.
    began = time.monotonic()  # Loading and scoring count as a part of the first batch.
    policy, params, tokenizer = load_starting_policy(experiment.policy, mesh)
    segments = find_segments(experiment, tokenizer)
    builder = PromptBuilder(experiment.prompt, tokenizer, experiment.prompt_slot, segments)
    source: PromptSource
    if experiment.traces.prompts == "questions":
        source = TrainingQuestions(experiment, params, tokenizer, builder, workdir)
    else:
        source = TextPositions(experiment, policy, params, tokenizer, segments, mesh, workdir, context)
    stamp = _stamp(experiment, source, params, tokenizer)

    # Leave out the batches that an interrupted run has written.
    size = experiment.training.prompts_per_step
    parts = [source.positions[i : i + size] for i in range(0, len(source.positions), size)]
    headers = {n: _read_header(batch_path(workdir, n), stamp) for n in range(len(parts))}
    headers = {n: header for n, header in headers.items() if header}
    wait_for_all("traces read")
    remaining = [n for n in range(len(parts)) if n not in headers]
    if headers:
        logger.info("%s of %s batches are written already.", f"{len(headers):,}", f"{len(parts):,}")

    # Sample, judge and write the others.
    def saved() -> str:
        return f"{len(headers)} batches of traces are in {workdir}"

    context.signals.set_save(saved, at_step_end=jax.process_count() > 1)
    sample = Sampler(experiment, policy, tokenizer, mesh, builder)
    batches = (_build(builder, source, parts[n], n * size, size) for n in remaining)
    try:
        with Progress("traces, batches", len(parts), len(headers)) as progress:
            for n, judged in zip(remaining, sample_and_judge(sample, source, params, batches), strict=True):
                batch = collect(judged, parts[n], source, experiment.traces.kept_per_prompt, tokenizer)
                now = time.monotonic()
                headers[n] = {**stamp, **batch.header, "seconds": now - began}
                began = now
                if is_leader():
                    write_batch(batch_path(workdir, n), batch._replace(header=headers[n]))
                context.stop_if_requested(saved)
                context.heartbeat.beat("traces")
                progress.advance(f"{headers[n]['accepted'] / headers[n]['responses']:.1%} accepted")
    finally:
        source.close()

    result = summarize(list(headers.values()), source.preparation_flops)
    result["rejected_questions"] = source.rejected_questions
    if is_leader():
        atomic_write(workdir / RESULT, json.dumps({**provenance(), **result}, indent=1) + "\n")
    _show(result, workdir)


def sample_and_judge(
    sample: Sampler, source: PromptSource, params: Params, batches: Iterator[PromptBatch]
) -> Iterator[JudgedBatch]:
    """Yield responses to batches of prompts. Those to a batch are judged while those to the next one are sampled.

    Args:
      sample: samples the responses.
      source: judges them.
      params: of the policy, sharded for training.
      batches: the prompts.
    """
    weights = sample.weights(params)

    def start(prompts: PromptBatch) -> tuple[PromptBatch, Rollouts, SamplingCost, Callable[[], np.ndarray]]:
        rollouts, cost = sample(weights, prompts, 0)
        return prompts, rollouts, cost, source.judge(prompts, rollouts)

    def finish(started: tuple[PromptBatch, Rollouts, SamplingCost, Callable[[], np.ndarray]]) -> JudgedBatch:
        prompts, rollouts, cost, judged = started
        tokens_PxGxT, lengths_PxG, flops = to_host((rollouts.tokens_PxGxT, rollouts.lengths_PxG, cost.flops))
        return JudgedBatch(
            prompts=prompts,
            tokens_PxGxT=tokens_PxGxT,
            lengths_PxG=lengths_PxG,
            status_PxG=judged(),
            flops=float(flops),
        )

    return finish_one_behind(map(start, batches), finish)


def collect(
    judged: JudgedBatch, positions: Sequence[Position], source: PromptSource, kept_per_prompt: int, tokenizer: Tokenizer
) -> TraceBatch:
    """Return the traces of a batch, and the counts of its header.

    Args:
      judged: responses to prompts at `positions`, and to what fills the batch.
      positions: of the prompts.
      source: of the prompts.
      kept_per_prompt: most traces of a prompt.
      tokenizer: decodes ids, for people who read the file.
    """
    count = len(positions)
    status_PxG = judged.status_PxG[:count]
    accepted_PxG = status_PxG == source.statuses["CORRECT"]
    traces = []
    for p, position in enumerate(positions):
        prompt = judged.prompts.tokens_PxS[p, : judged.prompts.lengths_P[p]].tolist()
        responses = (
            judged.tokens_PxGxT[p, g, : judged.lengths_PxG[p, g]].tolist() for g in np.flatnonzero(accepted_PxG[p])
        )
        for response in first_distinct(responses, kept_per_prompt):
            ids = {"prompt": prompt, "response": response, "length": len(response)}
            texts = {"prompt_text": tokenizer.decode(prompt), "response_text": tokenizer.decode(response)}
            traces.append({**source.origin(position), **ids, **texts})
    header = {
        "prompts": count,
        "responses": status_PxG.size,
        "accepted": int(accepted_PxG.sum()),
        "solved": int(accepted_PxG.any(axis=1).sum()),
        "kept": len(traces),
        "status": {status.name.lower(): int((status_PxG == status).sum()) for status in source.statuses},
        "prompt_tokens": int(judged.prompts.lengths_P[:count].sum()),
        "response_tokens": int(judged.lengths_PxG[:count].sum()),
        "flops": judged.flops,
    }
    return TraceBatch(header=header, traces=traces)


def summarize(headers: Sequence[Mapping[str, Any]], preparation_flops: float) -> dict[str, Any]:
    """Return what result.json says about a run, from the headers of its batches and the FLOPs of choosing its prompts."""
    totals = {name: sum(header[name] for header in headers) for name in _COUNTS}
    status: collections.Counter[str] = collections.Counter()
    for header in headers:
        status.update(header["status"])
    return {
        "steps": len(headers),
        **totals,
        "flops": totals["flops"] + preparation_flops,
        "accepted_share": totals["accepted"] / totals["responses"],
        "prompts_without_accepted": totals["prompts"] - totals["solved"],
        "status": dict(status),
    }


def _build(
    builder: PromptBuilder, source: PromptSource, positions: Sequence[Position], first_id: int, size: int
) -> PromptBatch:
    """Return the prompts at some positions, the last one repeated until there are `size`."""
    built = [builder.build(first_id + i, source.token_ids[p.window], p) for i, p in enumerate(positions)]
    return stack(built + built[-1:] * (size - len(built)))


def _stamp(experiment: Experiment, source: PromptSource, params: Params, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what all batches of a run have in common."""
    sampling = digest(
        sampling_fields(experiment),
        dataclasses.asdict(experiment.traces),
        experiment.training.prompts_per_step,
    )
    data = experiment.data
    options = dataclasses.asdict(data.target_options) if data.target_options else None
    positions = digest([[int(p.window), int(p.position)] for p in source.positions])
    return {
        "policy": fingerprint_arrays(params),
        "tokenizer": tokenizer.fingerprint,
        "accepted_by": source.accepted_by,
        "sampling": sampling,
        "prompts_from": digest(source.fingerprint, positions, data.targets, options),
    }


def _read_header(path: Path, stamp: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the header of a batch that is written. Raises: UserError, if it is damaged, or sampled from something else."""
    if not path.exists():
        return None
    header = read_batch(path, "--workdir").header
    changed = [name for name in stamp if header.get(name) != stamp[name]]
    if changed:
        raise UserError(
            f"{path} was sampled with another {', '.join(changed)}: choose another --workdir.", field="--workdir"
        )
    return header


def _show(result: Mapping[str, Any], workdir: Path) -> None:
    """Show the totals of a run, and the fields that use the traces."""
    rows = [
        ("prompts", f"{result['prompts']:,}"),
        ("prompts without an accepted response", f"{result['prompts_without_accepted']:,}"),
        ("responses", f"{result['responses']:,}"),
        ("accepted", f"{result['accepted_share']:.1%}"),
        ("response tokens", f"{result['response_tokens']:,}"),
        ("FLOPs", f"{result['flops']:.3g}"),
    ]
    table("Rejection sampling", ("quantity", "value"), rows)
    logger.info(
        "%s traces are kept: pre-train on them with --config.pretrain.traces=sampled --config.pretrain.trace_options.path=%s",
        f"{result['kept']:,}",
        workdir,
    )
