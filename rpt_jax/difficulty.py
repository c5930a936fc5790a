"""Task "difficulty": how often a policy solves each training question, for `questions.pass_rates` of fine-tuning runs.

Each question is answered `rollout.samples_per_prompt` times, sampled as in training. The results are appended to
`pass_rates.jsonl` as they come, so that the same command resumes; `questions.difficulty` reads the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.distributed.processes import is_leader, wait_for_all
from rpt_jax.errors import UserError
from rpt_jax.evaluation.batch_loop import evaluate_batches
from rpt_jax.evaluation.questions import QuestionSampling, VerifiedQuestions
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.console import Progress, table
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.run_format import format_stamp
from rpt_jax.infra.shared_files import share
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.question_prompts import tokenize_questions
from rpt_jax.questions.difficulty import PASS_RATES, PassRate, question_digest, read_pass_rates
from rpt_jax.questions.question import Question
from rpt_jax.rewards.verified import BatchVerifier, load_verifiable_questions, measured_with
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
    questions = load_verifiable_questions(experiment, params, tokenizer, workdir)
    prompts = tokenize_questions(questions.train, builder, tokenizer, "training")

    # Leave out what an interrupted run has measured.
    path = workdir / PASS_RATES
    stamp = measured_with(experiment, params, tokenizer)
    if is_leader():
        _begin(path, stamp)
    share(workdir, "pass rates begun")
    measured = _read_measured(path, stamp, prompts.questions)
    wait_for_all("pass rates read")
    remaining = [i for i, question in enumerate(prompts.questions) if question.id not in measured]
    if measured:
        logger.info("%s of %s questions are measured already.", f"{len(measured):,}", f"{len(prompts.questions):,}")

    # Sample and verify the others.
    context.signals.set_kept(lambda: f"pass rates of {len(measured):,} questions are in {path}")
    verify = BatchVerifier(experiment.questions, tokenizer)
    sample = Sampler(experiment, policy, tokenizer, mesh, builder)
    sampling = QuestionSampling(sample, prompts, builder, experiment.training.prompts_per_step)
    batches = VerifiedQuestions(sampling, params, verify, remaining)
    by_id = {question.id: question for question in prompts.questions}
    try:
        with sample.explain_out_of_memory(), Progress("difficulty, batches", batches.count) as progress:
            for _, records in evaluate_batches(batches, range(batches.count)):
                rates = {record["id"]: _pass_rate(by_id[record["id"]], record["correct"]) for record in records}
                measured |= rates
                if is_leader():
                    _append(path, [{"id": name, **rate._asdict()} for name, rate in rates.items()])
                context.heartbeat.beat("difficulty")
                progress.advance()
    finally:
        verify.close()
    _show(list(measured.values()), path)


def _pass_rate(question: Question, correct: Sequence[float]) -> PassRate:
    return PassRate(question=question_digest(question), passes=int(sum(correct)), samples=len(correct))


def _append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _begin(path: Path, stamp: dict[str, Any]) -> None:
    """Write the first line of a new file; cut off an incomplete last line, of a run that was killed."""
    data = path.read_bytes() if path.exists() else b""
    complete = data[: data.rfind(b"\n") + 1]
    atomic_write(path, complete or json.dumps({**format_stamp(), **stamp}) + "\n")


def _read_measured(path: Path, stamp: dict[str, Any], questions: Sequence[Question]) -> dict[str, PassRate]:
    """Return the pass rates of a file by question id.

    Raises: UserError, if a line is damaged, or of another policy, other sampling or another question.
    """
    found, rates = read_pass_rates(path, "--workdir")
    changed = [name for name in stamp if found[name] != stamp[name]]
    changed += [
        f"question {question.id}"
        for question in questions
        if question.id in rates and rates[question.id].question != question_digest(question)
    ][:1]
    if changed:
        raise UserError(
            f"{path} was measured with another {', '.join(changed)}: choose another --workdir.", field="--workdir"
        )
    return rates


def _show(rates: Sequence[PassRate], path: Path) -> None:
    """Show how many questions were solved how often, and the fields that use the result."""
    samples = max(rate.samples for rate in rates)
    counts = np.bincount([rate.passes for rate in rates], minlength=samples + 1)
    table("Questions by number of correct responses", ("correct", "questions"), list(enumerate(map(int, counts))))
    kept = int(counts[1:samples].sum())
    logger.info(
        "%s of %s questions were solved between 1 and %d of %d times: train with --config.questions.pass_rates=%s",
        f"{kept:,}",
        f"{len(rates):,}",
        samples - 1,
        samples,
        path,
    )
