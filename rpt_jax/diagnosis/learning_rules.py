"""Rules about what the updates do: groups without a gradient, steps that move nothing, rewards and losses that get worse."""

from __future__ import annotations

from collections.abc import Iterator

from rpt_jax.diagnosis.finding import Change, Evidence, Finding, Severity
from rpt_jax.diagnosis.rule import RULES, CannotCheck
from rpt_jax.diagnosis.run_record import RunRecord, mean_of

# From this fraction of groups without variance on, at most a fifth of the rollouts teach anything; DAPO (2503.14476) samples
# such groups again for this reason. configs/rpt_tiny.py has 0.4 at the start and 0.7 later.
ZERO_VARIANCE_GROUPS = 0.8
NEARLY_ALL = 0.95
# Without variance, prompts are too easy if most responses are right, and too hard if most are wrong. In between, the samples of a
# prompt hardly differ.
TOO_EASY = 0.8
TOO_HARD = 0.2
MOSTLY = 0.5
# A run whose updates add up to less than this fraction of the parameters' norm cannot change its policy: their sum bounds the
# distance from the start. A thousand of the paper's steps (learning rate 1e-6) add up to about 2e-3, and bfloat16 rounds to 4e-3.
LEAST_MOTION = 1e-4
# The reward has fallen if it is below this fraction of its best mean, and that mean was more than noise.
FALLEN_REWARD = 0.5
LEAST_REWARD = 0.05
# A cross-entropy that ends this much above its lowest mean has diverged; means over many windows vary by a few percent.
RISEN_LOSS = 1.2


@RULES.register(
    "zero_variance",
    tasks=("rpt", "rft"),
    metrics=("groups/drawn_zero_variance", "status/correct", "status/no_box", "status/empty", "status/not_finished"),
)
def zero_variance(run: RunRecord) -> Iterator[Finding]:
    """In 80 % of the groups or more, all samples earn the same: prompts are too easy or too hard, or samples too similar."""
    share = run.last("groups/drawn_zero_variance")
    if share.value < ZERO_VARIANCE_GROUPS:
        return
    correct = run.last("status/correct")
    missing = [run.last(f"status/{name}") for name in ("no_box", "empty", "not_finished")]
    if sum(evidence.value for evidence in missing) >= MOSTLY:
        yield Finding(
            severity=Severity.WARNING,
            sentence=(
                f"In {share.value:.0%} of the groups of {share.steps}, all samples earned the same, because most responses have "
                "no prediction: see the other findings."
            ),
            evidence=(share, *missing),
            changes=(),
        )
        return
    cause = "the samples of a prompt hardly differ"
    changes: tuple[Change, ...] = (run.raised("rollout.temperature"),)
    if correct.value >= TOO_EASY or correct.value <= TOO_HARD:
        easy = correct.value >= TOO_EASY
        cause = f"the prompts are too {'easy' if easy else 'hard'}"
        changes = tuple(_difficulty_changes(run, easy))
    yield Finding(
        severity=Severity.PROBLEM if share.value >= NEARLY_ALL else Severity.WARNING,
        sentence=(
            f"In {share.value:.0%} of the groups of {share.steps}, all samples earned the same, so that nothing is learned from "
            f"them. {correct.value:.0%} of the responses were right: {cause}."
        ),
        evidence=(share, correct),
        changes=(*changes, run.raised("rollout.samples_per_prompt"), *_earlier_dynamic_sampling(run)),
    )


def _difficulty_changes(run: RunRecord, easy: bool) -> Iterator[Change]:
    """Yield the changes that make prompts harder, if they are too easy, or else easier."""
    if run.task == "rft" and not run.config.get("questions.pass_rates"):
        yield run.set_to("questions.pass_rates", "the file that task 'difficulty' writes")
    elif run.task == "rft":
        yield run.lowered("questions.max_passes") if easy else run.raised("questions.min_passes")
    elif run.config.get("data.positions") in ("threshold", "curriculum"):
        yield run.raised("data.entropy_threshold") if easy else run.lowered("data.entropy_threshold")


def _earlier_dynamic_sampling(run: RunRecord) -> Iterator[Change]:
    if run.number("training.dynamic_sampling_from") > run.last_step:
        yield run.set_to("training.dynamic_sampling_from", 1)


@RULES.register("nothing_moves", metrics=("update/norm", "parameters/norm", "gradient/norm"))
def nothing_moves(run: RunRecord) -> Iterator[Finding]:
    """There is a gradient, but all updates together are less than 1e-4 of the parameters: the learning rate is too low."""
    if not run.is_complete and run.last_step <= run.number("optimizer.warmup_steps"):
        raise CannotCheck("the learning rate is still warming up")
    steps, norms = run.series("update/norm")
    moving = [norm for norm in run.series("gradient/norm")[1] if norm > 0]
    if len(moving) < len(steps) / 2:
        return  # Without a gradient, no learning rate helps.
    size = run.last("parameters/norm")
    motion = sum(norms) / len(norms) * run.total_steps / size.value
    if motion >= LEAST_MOTION:
        return
    yield Finding(
        severity=Severity.PROBLEM,
        sentence=(
            f"The learning rate moves nothing: all {run.total_steps} updates together change the parameters by at most "
            f"{motion:.1g} of their norm ({size.value:.4g}), although there is a gradient."
        ),
        evidence=(mean_of("update/norm", steps, norms), size, run.last("gradient/norm")),
        changes=(run.raised("optimizer.learning_rate"), run.lowered("optimizer.warmup_steps")),
    )


@RULES.register("reward_fell", tasks=("rpt", "rft"), metrics=("reward/drawn_mean",), steps=20)
def reward_fell(run: RunRecord) -> Iterator[Finding]:
    """The training reward ends at less than half of its best mean."""
    best = _extreme_mean(run, "reward/drawn_mean", highest=True)
    last = run.last("reward/drawn_mean")
    if best.value < LEAST_REWARD or last.value >= FALLEN_REWARD * best.value:
        return
    yield Finding(
        severity=Severity.PROBLEM,
        sentence=f"The training reward fell from {best.value:.3f} in {best.steps} to {last.value:.3f} in {last.steps}.",
        evidence=(best, last),
        changes=(
            run.lowered("optimizer.learning_rate"),
            run.set_to("objective.kl", "k3")
            if run.config.get("objective.kl") == "none"
            else run.raised("objective.kl_weight"),
        ),
    )


@RULES.register("loss_rose", tasks=("pretrain",), metrics=("loss/document",), steps=20)
def loss_rose(run: RunRecord) -> Iterator[Finding]:
    """The cross-entropy ends more than a fifth above its lowest mean."""
    for metric, weight in (("loss/document", "pretrain.document_weight"), ("loss/trace", "pretrain.trace_weight")):
        if not run.series(metric)[0] or run.number(weight) == 0:
            continue
        lowest = _extreme_mean(run, metric, highest=False)
        last = run.last(metric)
        if last.value <= RISEN_LOSS * lowest.value:
            continue
        yield Finding(
            severity=Severity.PROBLEM,
            sentence=(
                f"{metric} rose from {lowest.value:.3f} nats in {lowest.steps} to {last.value:.3f} in {last.steps}: "
                "the training diverges."
            ),
            evidence=(lowest, last),
            changes=(run.lowered("optimizer.learning_rate"), run.raised("optimizer.warmup_steps")),
        )


def _extreme_mean(run: RunRecord, metric: str, *, highest: bool) -> Evidence:
    """Return the highest or the lowest of the means of a metric over consecutive blocks of steps, as many as `last` takes."""
    steps, values = run.series(metric)
    size = run.window(metric)
    blocks = [mean_of(metric, steps[i : i + size], values[i : i + size]) for i in range(0, len(steps) - size + 1, size)]
    return (max if highest else min)(blocks, key=lambda block: block.value)
