"""Rules about responses: their format, length, diversity, and the log-probabilities that they were sampled with."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rpt_jax.diagnosis.finding import Evidence, Finding, Severity
from rpt_jax.diagnosis.rule import RULES, CannotCheck
from rpt_jax.diagnosis.run_record import RunRecord, mean_of
from rpt_jax.infra.rollout_files import TRAINING

# A response without a prediction earns nothing, so this fraction of the reward is out of reach.
NO_PREDICTION = 0.2
# A response that is cut counts as wrong: with a tenth of them, no accuracy is above 90 %.
CUT_RESPONSES = 0.1
HALF = 0.5
# Below this entropy, the samples of a prompt hardly differ (0.01 nats per token is one other token in about 750).
LEAST_ENTROPY = 0.01
# The entropy has collapsed if it fell below this fraction of its start and most groups have no variance: then exploration is used
# up, and the reward no longer rises (2505.22617). In configs/rpt_tiny.py it falls to 0.4 of it.
COLLAPSED_ENTROPY = 0.1
# Above this entropy, a sampled token is one of 20 equally likely ones (e^3). Policies that reason are below 1 nat.
MOST_ENTROPY = 3.0
# Above this mean difference of log-probabilities, sampler and trainer differ by half of the default clip range of 0.2.
LARGE_MISMATCH = 0.1
# Growth counts from a difference that the rounding of bfloat16 does not explain (a relative error of 2^-9 in logits of about 5).
GROWN_MISMATCH = 0.01
MISMATCH_GROWTH = 3.0
# A template that half of the responses follow, and that at most half as many followed in the beginning.
TEMPLATE_SHARE = 0.5
TEMPLATE_GROWTH = 2.0
LEAST_PROMPTS = 20  # Different prompts whose responses are compared.
_OPENING_STEPS = 10  # Steps whose kept responses are compared with those of as many others.
_OPENING_WORDS = 8
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@RULES.register("format_not_learned", tasks=("rpt", "rft"), metrics=("status/no_box", "status/empty"))
def format_not_learned(run: RunRecord) -> Iterator[Finding]:
    """A fifth of the responses or more end without a prediction in a box."""
    missing = _sum(run.last("status/no_box"), run.last("status/empty"))
    if missing.value < NO_PREDICTION:
        return
    before = _sum(run.first("status/no_box"), run.first("status/empty"))
    explained = "v0" if run.task == "rpt" else "boxed_answer"  # The template that explains the format.
    yield Finding(
        severity=Severity.PROBLEM if missing.value >= HALF else Severity.WARNING,
        sentence=(
            f"The format is not learned: {missing.value:.0%} of the responses of {missing.steps} ended without a prediction in a "
            f"box ({before.value:.0%} in {before.steps})."
        ),
        evidence=(before, missing),
        changes=(
            *((run.raised("cold_start.total_steps"),) if run.task == "rpt" else ()),
            *((run.set_to("prompt.template", explained),) if run.config.get("prompt.template") != explained else ()),
            run.raised("objective.format_weight"),
        ),
    )


@RULES.register("responses_cut", tasks=("rpt", "rft"), metrics=("ended/length", "length/mean"))
def responses_cut(run: RunRecord) -> Iterator[Finding]:
    """A tenth of the responses or more are cut off at the length limit, in training or in an evaluation on questions."""
    before, cut = run.first("ended/length"), run.last("ended/length")
    limit = "rollout.max_new_tokens"
    if cut.value >= CUT_RESPONSES:
        yield Finding(
            severity=Severity.PROBLEM if cut.value >= HALF else Severity.WARNING,
            sentence=(
                f"{cut.value:.0%} of the responses of {cut.steps} were cut off at {limit}={run.number(limit):g} and earned "
                f"nothing ({before.value:.0%} in {before.steps})."
            ),
            evidence=(before, cut, run.last("length/mean")),
            changes=(
                # Responses that became so long have come apart, which a higher limit does not mend.
                *((run.lowered("optimizer.learning_rate"),) if before.value < cut.value / 2 else ()),
                run.raised(limit),
                *(() if run.config.get("rollout.stop_at_box") else (run.set_to("rollout.stop_at_box", True),)),
            ),
        )
    steps, values = run.series("eval/questions/truncated")
    if values and values[-1] >= CUT_RESPONSES:
        truncated = mean_of("eval/questions/truncated", steps[-1:], values[-1:])
        yield Finding(
            severity=Severity.WARNING,
            sentence=(
                f"{truncated.value:.0%} of the responses in the evaluation at {truncated.steps} were cut off and count as wrong."
            ),
            evidence=(truncated,),
            changes=(run.raised("evaluation.max_new_tokens" if run.number("evaluation.max_new_tokens") else limit),),
        )


@RULES.register("entropy_collapse", tasks=("rpt", "rft"), metrics=("policy/entropy", "groups/drawn_zero_variance"))
def entropy_collapse(run: RunRecord) -> Iterator[Finding]:
    """The policy hardly explores: its entropy is below 0.01 nats, or a tenth of its start while most groups have no variance."""
    first, last = run.first("policy/entropy"), run.last("policy/entropy")
    share = run.last("groups/drawn_zero_variance")
    fell = last.value < COLLAPSED_ENTROPY * first.value and share.value >= HALF
    if last.value >= LEAST_ENTROPY and not fell:
        return
    began_low = first.value < LEAST_ENTROPY
    yield Finding(
        severity=Severity.PROBLEM,
        sentence=(
            f"The policy hardly explores: its entropy is {last.value:.2g} nats per token in {last.steps} "
            f"({first.value:.2g} in {first.steps}), and in {share.value:.0%} of the groups all samples earn the same."
        ),
        evidence=(first, last, share),
        changes=(
            *(() if began_low else (run.lowered("optimizer.learning_rate"), run.raised("objective.entropy_weight"))),
            run.raised("rollout.temperature"),
        ),
    )


@RULES.register("entropy_too_high", tasks=("rpt", "rft"), metrics=("policy/entropy",))
def entropy_too_high(run: RunRecord) -> Iterator[Finding]:
    """The sampled tokens are nearly random: the policy's entropy is above 3 nats per token."""
    first, last = run.first("policy/entropy"), run.last("policy/entropy")
    if last.value <= MOST_ENTROPY:
        return
    grew = last.value > 2 * first.value
    yield Finding(
        severity=Severity.PROBLEM,
        sentence=(
            f"Sampled tokens are nearly random: the policy's entropy is {last.value:.2f} nats per token in {last.steps} "
            f"({first.value:.2f} in {first.steps})."
        ),
        evidence=(first, last),
        changes=(run.lowered("optimizer.learning_rate" if grew else "rollout.temperature"),),
    )


@RULES.register("mismatch", tasks=("rpt", "rft"), metrics=("mismatch/mean",), steps=20)
def mismatch(run: RunRecord) -> Iterator[Finding]:
    """Sampler and trainer disagree by 0.1 nats per token, or by 0.01 nats and three times as much as in the beginning."""
    first, last = run.first("mismatch/mean"), run.last("mismatch/mean")
    grew = last.value >= max(MISMATCH_GROWTH * first.value, GROWN_MISMATCH)
    if last.value < LARGE_MISMATCH and not grew:
        return
    yield Finding(
        severity=Severity.PROBLEM if last.value >= LARGE_MISMATCH else Severity.WARNING,
        sentence=(
            f"The log-probabilities of sampler and trainer differ by {last.value:.2g} nats per token in {last.steps} "
            f"({first.value:.2g} in {first.steps}), so that the gradient is not that of the sampled policy."
        ),
        evidence=(first, last),
        changes=(
            run.set_to("objective.importance", "truncate"),
            *((run.set_to("policy.dtype", "float32"),) if run.config.get("policy.dtype") != "float32" else ()),
            *(
                (run.set_to("policy.head_precision", "float32"),)
                if run.config.get("policy.head_precision") in ("auto", "bfloat16")
                else ()
            ),
        ),
    )


@RULES.register("template_collapse", tasks=("rpt", "rft"), metrics=("distinct/3",), steps=20)
def template_collapse(run: RunRecord) -> Iterator[Finding]:
    """Half of the responses or more begin with the same words, numbers aside, and at most half as many did in the beginning."""
    before = _openings(run, last=False)
    after = _openings(run, last=True)
    earlier = before.share_of(after.opening)
    if after.share < TEMPLATE_SHARE or earlier * TEMPLATE_GROWTH > after.share:
        return
    opening = f"begin with “{' '.join(after.opening)}”" if after.opening else "have no words of reasoning"
    metric = "share of the opening"
    yield Finding(
        severity=Severity.WARNING,
        sentence=(
            f"The responses follow one template: {after.share:.0%} of those kept of steps {after.first_step} to "
            f"{after.last_step} {opening} ({earlier:.0%} in steps {before.first_step} to {before.last_step})."
        ),
        evidence=(
            Evidence(metric, earlier, before.first_step, before.last_step),
            Evidence(metric, after.share, after.first_step, after.last_step),
            run.last("distinct/3"),
        ),
        changes=(
            run.raised("objective.entropy_weight"),
            run.lowered("optimizer.learning_rate"),
            run.raised("rollout.temperature"),
        ),
    )


class _Openings(NamedTuple):
    """How responses begin.

    Attributes:
      counts: of each opening.
      first_step, last_step: of the responses.
    """

    counts: collections.Counter[tuple[str, ...]]
    first_step: int
    last_step: int

    @property
    def opening(self) -> tuple[str, ...]:
        """The most frequent opening."""
        return self.counts.most_common(1)[0][0]

    @property
    def share(self) -> float:
        """The share of responses that begin with it."""
        return self.share_of(self.opening)

    def share_of(self, opening: Sequence[str]) -> float:
        """Return the share of responses with an opening."""
        return self.counts[tuple(opening)] / self.counts.total()


def _openings(run: RunRecord, *, last: bool) -> _Openings:
    """Return the openings of the responses in the first steps of the first kept file or the last steps of the last one.

    Raises: CannotCheck, if there are too few.
    """
    rows = run.rollouts(TRAINING, ("step", "prompt", "reasoning"), last=last)
    kept_steps = sorted({row["step"] for row in rows})
    compared = set(kept_steps[-_OPENING_STEPS:] if last else kept_steps[:_OPENING_STEPS])
    rows = [row for row in rows if row["step"] in compared]
    prompts = {(row["step"], row["prompt"]) for row in rows}
    if len(prompts) < LEAST_PROMPTS:
        raise CannotCheck(f"{len(prompts)} of the {LEAST_PROMPTS} prompts are kept that it needs")
    return _Openings(collections.Counter(_opening(row) for row in rows), min(compared), max(compared))


def _opening(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the first words of a response, with 0 for every number."""
    return tuple(_NUMBER.sub("0", row["reasoning"]).lower().split()[:_OPENING_WORDS])


def _sum(first: Evidence, second: Evidence) -> Evidence:
    """Return the sum of two metrics over the same steps."""
    return Evidence(f"{first.metric} + {second.metric}", first.value + second.value, first.first_step, first.last_step)
