"""Rules about prompts: how often they come again, and what of them is lost."""

from __future__ import annotations

from collections.abc import Iterator

from rpt_jax.diagnosis.finding import Change, Evidence, Finding, Severity
from rpt_jax.diagnosis.rule import RULES
from rpt_jax.diagnosis.run_record import RunRecord
from rpt_jax.registry import POSITION_CHOICES

# Up to four passes, repeated text is nearly as good as new text (2305.16264).
MOST_PASSES = 4.0
# Questions that the policy solves this much more often in training than in the test were learned by heart. Repeating them is
# otherwise normal: the paper has 256.
MEMORIZED = 0.25
# The context is what predictions are made from: a tenth of the prompts without their beginning changes what is trained.
CUT_PROMPTS = 0.1
# An unverified response counts as wrong, which is noise in the reward.
UNVERIFIED = 0.05


@RULES.register("too_few_positions", tasks=("rpt", "pretrain"), metrics=("data/passes",))
def too_few_positions(run: RunRecord) -> Iterator[Finding]:
    """All steps together pass more than four times through the training positions, or windows."""
    steps, passes = run.series("data/passes")
    most = max(passes)
    step = steps[passes.index(most)]
    at_the_end = most
    if run.task == "pretrain" or not _chooses_again(run):
        at_the_end = passes[-1] * run.total_steps / steps[-1]
    if max(most, at_the_end) <= MOST_PASSES:
        return
    things = "windows" if run.task == "pretrain" else "positions"
    asked = f", and would be {at_the_end:.1f} times after {run.total_steps}" if at_the_end > most else ""
    yield Finding(
        severity=Severity.WARNING,
        sentence=f"There are too few training {things}: they were passed through {most:.1f} times by step {step}{asked}.",
        evidence=(Evidence("data/passes", most, step, step),),
        changes=(run.lowered("training.total_steps"), *_more_positions(run)),
    )


def _chooses_again(run: RunRecord) -> bool:
    """Return whether the positions are chosen again during the run, so that passes start at 0."""
    choice = str(run.config.get("data.positions"))
    if choice not in POSITION_CHOICES:
        return True  # A user's own, which is not registered here.
    requirements = POSITION_CHOICES[choice].requirements
    return requirements.rescored or requirements.staged


def _more_positions(run: RunRecord) -> Iterator[Change]:
    if run.task == "rpt" and run.config.get("data.positions") in ("threshold", "curriculum"):
        yield run.lowered("data.entropy_threshold")
    if run.config.get("data.source_options.documents") is not None:
        yield run.raised("data.source_options.documents")


@RULES.register(
    "questions_memorized", tasks=("rft",), metrics=("data/passes", "reward/drawn_mean", "eval/questions/accuracy")
)
def questions_memorized(run: RunRecord) -> Iterator[Finding]:
    """After four passes, training questions are solved at least 25 points more often than test questions."""
    steps, passes = run.series("data/passes")
    evaluated, accuracies = run.series("eval/questions/accuracy")
    reward = run.last("reward/drawn_mean")
    if passes[-1] <= MOST_PASSES or reward.value - accuracies[-1] < MEMORIZED or _reward_has_other_terms(run):
        return
    accuracy = Evidence("eval/questions/accuracy", accuracies[-1], evaluated[-1], evaluated[-1])
    yield Finding(
        severity=Severity.WARNING,
        sentence=(
            f"The training questions are learned by heart: the policy earns {reward.value:.2f} on them in {reward.steps}, after "
            f"{passes[-1]:.1f} passes, and {accuracy.value:.2f} on the test questions at {accuracy.steps}."
        ),
        evidence=(Evidence("data/passes", passes[-1], steps[-1], steps[-1]), reward, accuracy),
        changes=(run.lowered("training.total_steps"), run.raised("questions.train_questions")),
    )


def _reward_has_other_terms(run: RunRecord) -> bool:
    """Return whether the training reward is more than the verifier's score."""
    return any(run.number(f"objective.{term}") for term in ("format_weight", "overlong_weight", "budget_weight"))


@RULES.register("prompts_cut", tasks=("rpt",), metrics=("data/cut",))
def prompts_cut(run: RunRecord) -> Iterator[Finding]:
    """A tenth of the prompts or more lose the beginning of their context."""
    cut = run.last("data/cut")
    if cut.value < CUT_PROMPTS:
        return
    limit = "prompt.max_tokens"
    yield Finding(
        severity=Severity.WARNING,
        sentence=(
            f"{cut.value:.0%} of the prompts of {cut.steps} were longer than {limit}={run.number(limit):g} and lost the "
            "beginning of their context."
        ),
        evidence=(cut,),
        changes=(run.raised(limit), run.lowered("data.max_document_tokens")),
    )


@RULES.register("answers_unverified", tasks=("rpt", "rft"), metrics=("status/unverified",), rpt_reward="verified")
def answers_unverified(run: RunRecord) -> Iterator[Finding]:
    """One answer in twenty or more cannot be verified in time, or makes the verifier fail, and counts as wrong."""
    unverified = run.last("status/unverified")
    if unverified.value < UNVERIFIED:
        return
    yield Finding(
        severity=Severity.WARNING,
        sentence=f"{unverified.value:.0%} of the answers of {unverified.steps} could not be verified and counted as wrong.",
        evidence=(unverified,),
        changes=(run.raised("questions.verifier_seconds"), run.raised("questions.verifier_workers")),
    )
