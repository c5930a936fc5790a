"""Task "difficulty": how often a policy solves each training question, for `questions.pass_rates` of fine-tuning runs.

Each question is answered `rollout.samples_per_prompt` times, sampled as in training. The results are appended to
`pass_rates.jsonl` as they come, so that the same command resumes. Every line has the question's `id`, its `passes` and `samples`,
and the fingerprint of the `policy`, the `verifier` and the sampling that they are of.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.distributed.processes import is_leader, wait_for_all
from rpt_jax.errors import UserError
from rpt_jax.evaluation.questions import SampledBatch, sample_and_verify
from rpt_jax.infra.console import Progress, table
from rpt_jax.infra.digest import digest
from rpt_jax.infra.fingerprint import fingerprint_arrays
from rpt_jax.infra.run_context import RunContext
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.question_prompts import question_batches, tokenize_questions
from rpt_jax.questions.difficulty import PASS_RATES
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier, load_verifiable_questions
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.setup import load_starting_policy

logger = logging.getLogger(__name__)


def measure(experiment: Experiment, workdir: Path, mesh: Mesh, context: RunContext) -> None:
    """Write the pass rate of every training question to `workdir/pass_rates.jsonl`; questions that it has are skipped.

    Raises: UserError, if the file is of another policy or other sampling, or the policy or the questions cannot be used.
    """
    # Load the policy and the questions.
    policy, params, tokenizer = load_starting_policy(experiment.policy, mesh)
    builder = PromptBuilder(experiment.prompt, tokenizer, experiment.prompt_slot)
    questions = load_verifiable_questions(experiment.questions, workdir)
    prompts = tokenize_questions(questions.train, builder, tokenizer, "training")
    stamp = {
        "policy": fingerprint_arrays(params),
        "verifier": experiment.questions.verifier,
        "sampling": digest(dataclasses.asdict(experiment.prompt), _sampling_values(experiment), experiment.seed),
    }

    # Leave out what an interrupted run has measured.
    path = workdir / PASS_RATES
    measured = _read_measured(path, stamp)
    wait_for_all("pass rates read")
    remaining = [i for i, question in enumerate(prompts.questions) if question.id not in measured]
    if measured:
        logger.info("%s of %s questions are measured already.", f"{len(measured):,}", f"{len(prompts.questions):,}")

    # Sample and verify the others.
    verify = BatchVerifier(experiment.questions, tokenizer)
    sample = Sampler(experiment, policy, tokenizer, mesh, builder)
    size = experiment.training.prompts_per_step
    batches = question_batches(prompts, builder, size, remaining)
    try:
        with Progress("difficulty, batches", len(batches)) as progress:
            for batch in sample_and_verify(sample, verify, params, prompts, batches):
                # What pads the last batch has the same id as its last question.
                ids = [question.id for question in prompts.of(batch.prompts)]
                lines = {i: {"id": i, **passes, **stamp} for i, passes in zip(ids, _passes(batch), strict=True)}
                measured |= lines
                if is_leader():
                    _append(path, lines.values())
                context.heartbeat.beat("difficulty")
                progress.advance()
    finally:
        verify.close()
    _show(list(measured.values()), path)


def _sampling_values(experiment: Experiment) -> dict[str, Any]:
    """Return the fields of section `rollout` that change what is sampled."""
    return {
        name: value
        for name, value in dataclasses.asdict(experiment.rollout).items()
        if name not in ("decode_slots", "prefill_tokens")
    }


def _passes(batch: SampledBatch) -> list[dict[str, int]]:
    status_PxG = batch.verified.status_PxG
    passes_P = np.sum(status_PxG == AnswerStatus.CORRECT, axis=1)
    return [{"passes": int(passes), "samples": status_PxG.shape[1]} for passes in passes_P]


def _append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _read_measured(path: Path, stamp: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the lines of a file by question id; an incomplete last line, of a run that was killed, is cut off.

    Raises: UserError, if a line is damaged, or of another policy or other sampling.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if complete != data and is_leader():
        path.write_bytes(complete)
    measured = {}
    for number, text in enumerate(complete.splitlines(), start=1):
        try:
            line = json.loads(text)
            found = {name: line[name] for name in stamp}
            measured[line["id"]] = line
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}:{number} is damaged: remove it, or choose another --workdir.", field="--workdir"
            ) from None
        if found != stamp:
            changed = ", ".join(name for name in stamp if found[name] != stamp[name])
            raise UserError(
                f"{path}:{number} was measured with another {changed}: choose another --workdir.", field="--workdir"
            )
    return measured


def _show(lines: list[dict[str, Any]], path: Path) -> None:
    """Show how many questions were solved how often, and the fields that use the result."""
    samples = max(line["samples"] for line in lines)
    counts = np.bincount([line["passes"] for line in lines], minlength=samples + 1)
    table("Questions by number of correct responses", ("correct", "questions"), list(enumerate(map(int, counts))))
    kept = int(counts[1:samples].sum())
    logger.info(
        "%s of %s questions were solved between 1 and %d of %d times: train with --config.questions.pass_rates=%s",
        f"{kept:,}",
        f"{len(lines):,}",
        samples - 1,
        samples,
        path,
    )
