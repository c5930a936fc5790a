"""Rules about time: devices that wait, decode slots that are empty, programs that are compiled again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rpt_jax.diagnosis.finding import Change, Evidence, Finding, Severity
from rpt_jax.diagnosis.rule import RULES, CannotCheck
from rpt_jax.diagnosis.run_record import RunRecord

# The devices wait for the host in a tenth of the time of training steps: as much as a tenth more devices would give.
IDLE = 0.1
_PHASES = ("data", "rescore", "reshard", "rollout", "reward", "update", "checkpoint")
# At least half of the decode slots should hold a response; the sampler of configs/rpt_tiny.py fills 85 % of them.
FILLED_SLOTS = 0.5
# After its first two steps, a process has compiled all programs but those of its first evaluation, of the first rescoring and of
# the first step of dynamic sampling. Three later steps that compile are a pattern, and a twentieth of the time is worth a change.
COMPILING_STEPS = 3
COMPILING_TIME = 0.05
_STEPS_THAT_COMPILE = 2
_LEAST_STEPS = 10


@RULES.register("device_idle", tasks=("rpt", "rft"), metrics=("time/data", "time/rollout", "time/update"))
def device_idle(run: RunRecord) -> Iterator[Finding]:
    """The devices wait for prompts, verifiers or checkpoints in a tenth of the time of training steps or more."""
    lines = [line for line in run.training_lines if "time/rollout" in line and not line.get("time/compiled_programs")]
    if len(lines) < _LEAST_STEPS:
        raise CannotCheck(f"{len(lines)} of the {_LEAST_STEPS} steps that it needs compiled no program")
    total = _sum(lines, [f"time/{phase}" for phase in _PHASES])
    waits: dict[str, tuple[str, tuple[Change, ...]]] = {
        "time/data": ("for prompts", (run.raised("data.workers"),)),
        "time/verification": ("for verifiers", (run.raised("questions.verifier_workers"),)),
        "time/checkpoint": ("for checkpoints", (run.raised("checkpoint.every_steps"),)),
    }
    for metric, (what, changes) in waits.items():
        share = _sum(lines, [metric]) / total
        if share >= IDLE:
            evidence = Evidence(f"{metric} / time", share, int(lines[0]["step"]), int(lines[-1]["step"]))
            yield Finding(
                severity=Severity.WARNING,
                sentence=f"The devices wait {what} in {share:.0%} of the time of {evidence.steps}.",
                evidence=(evidence,),
                changes=changes,
            )


@RULES.register("slots_empty", tasks=("rpt", "rft"), metrics=("rollout/occupancy", "length/mean", "length/max"))
def slots_empty(run: RunRecord) -> Iterator[Finding]:
    """Less than half of the decode slots hold a response, on average: a few long responses keep the others waiting."""
    filled = run.last("rollout/occupancy")
    if filled.value >= FILLED_SLOTS:
        return
    mean, longest = run.last("length/mean"), run.last("length/max")
    yield Finding(
        severity=Severity.WARNING,
        sentence=(
            f"Only {filled.value:.0%} of the decode slots held a response in {filled.steps}: the longest of a step has "
            f"{longest.value:.0f} tokens, the mean {mean.value:.0f}. With fewer slots, free ones are filled again."
        ),
        evidence=(filled, mean, longest),
        changes=(_fewer_slots(run), run.lowered("rollout.max_new_tokens")),
    )


def _fewer_slots(run: RunRecord) -> Change:
    if run.number("rollout.decode_slots"):
        return run.lowered("rollout.decode_slots")
    rollouts = run.number("training.prompts_per_step") * run.number("rollout.samples_per_prompt")
    return run.set_to("rollout.decode_slots", max(1, int(rollouts) // 2))


@RULES.register("compiling", tasks=("rpt", "rft"), metrics=("time/compiled_programs", "time/compile", "time/step"))
def compiling(run: RunRecord) -> Iterator[Finding]:
    """After the first steps, three steps or more compile programs, which takes a twentieth of the time or more."""
    lines = list(_steady_lines(run))
    if len(lines) < _LEAST_STEPS:
        raise CannotCheck(f"there are {len(lines)} of the {_LEAST_STEPS} steps after the first ones that it needs")
    compiled = [line for line in lines if line["time/compiled_programs"]]
    share = _sum(lines, ["time/compile"]) / max(1e-9, _sum(lines, ["time/step"]))
    if len(compiled) < COMPILING_STEPS or share < COMPILING_TIME:
        return
    evidence = Evidence("time/compile / time/step", share, int(compiled[0]["step"]), int(compiled[-1]["step"]))
    yield Finding(
        severity=Severity.WARNING,
        sentence=(
            f"Programs are compiled inside the loop: in {len(compiled)} steps between {compiled[0]['step']:.0f} and "
            f"{compiled[-1]['step']:.0f}, for {share:.0%} of the time. Warnings in the run's log name the programs."
        ),
        evidence=(evidence,),
        changes=(),
    )


def _steady_lines(run: RunRecord) -> Iterator[Mapping[str, float]]:
    """Yield the lines of steps that should not compile anything."""
    since_start = 0
    sampled_again = False
    for line in run.lines:
        since_start = 0 if "time/setup" in line else since_start + 1
        first_sampled_again = line.get("groups/rounds", 1) > 1 and not sampled_again
        sampled_again |= first_sampled_again
        begins = since_start <= _STEPS_THAT_COMPILE or first_sampled_again
        is_evaluated = any(key.startswith("eval/") for key in line)
        if not begins and not is_evaluated and "time/rescore" not in line and "time/compiled_programs" in line:
            yield line


def _sum(lines: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> float:
    return sum(line.get(metric, 0.0) for line in lines for metric in metrics)
