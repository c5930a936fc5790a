"""Every rule: a sick run that it finds, and healthy runs that it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.diagnosis.examination import Diagnosis, examine
from rpt_jax.diagnosis.finding import Finding, Severity
from rpt_jax.diagnosis.rule import RULES
from tests.helpers.diagnosis import METRICS, line, write_evaluation_rollouts, write_run, write_training_rollouts

ZERO_VARIANCE = {"groups/drawn_zero_variance": 0.97}
# Case: rule, field that is to be changed first, and arguments of `write_run`.
SICK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "too easy": (
        "zero_variance",
        "data.entropy_threshold",
        {"metrics": ZERO_VARIANCE | {"status/correct": 0.96, "reward/drawn_mean": 0.96}},
    ),
    "too hard": (
        "zero_variance",
        "data.entropy_threshold",
        {"metrics": ZERO_VARIANCE | {"status/correct": 0.01, "reward/drawn_mean": 0.01}},
    ),
    "deterministic": ("zero_variance", "rollout.temperature", {"metrics": ZERO_VARIANCE}),
    "too hard questions": (
        "zero_variance",
        "questions.min_passes",
        {
            "task": "rft",
            "metrics": ZERO_VARIANCE | {"status/correct": 0.01, "reward/drawn_mean": 0.01},
            "config": {"questions.pass_rates": "rates.jsonl"},
        },
    ),
    "unfiltered questions": (
        "zero_variance",
        "questions.pass_rates",
        {"task": "rft", "metrics": ZERO_VARIANCE | {"status/correct": 0.99, "reward/drawn_mean": 0.99}},
    ),
    "without predictions": (
        "zero_variance",
        "",
        {"metrics": ZERO_VARIANCE | {"status/no_box": 0.4, "status/not_finished": 0.3}},
    ),
    "tiny learning rate": ("nothing_moves", "optimizer.learning_rate", {"metrics": {"update/norm": 1e-7}}),
    "no learning rate": (
        "nothing_moves",
        "optimizer.learning_rate",
        {"task": "pretrain", "metrics": {"update/norm": 0.0}},
    ),
    "collapsed reward": (
        "reward_fell",
        "optimizer.learning_rate",
        {"metrics": {"reward/drawn_mean": lambda done: 0.5 if done < 0.6 else 0.02}},
    ),
    "diverged pre-training": (
        "loss_rose",
        "optimizer.learning_rate",
        {"task": "pretrain", "metrics": {"loss/trace": lambda done: 4.0 if done < 0.5 else 6.5}},
    ),
    "cold policy": (
        "format_not_learned",
        "cold_start.total_steps",
        {"metrics": {"status/no_box": 0.7, "status/empty": 0.1}},
    ),
    "cold policy, questions": (
        "format_not_learned",
        "prompt.template",
        {"task": "rft", "metrics": {"status/no_box": 0.3}},
    ),
    "short limit": ("responses_cut", "rollout.max_new_tokens", {"metrics": {"ended/length": 0.4}}),
    "grown responses": ("responses_cut", "optimizer.learning_rate", {"metrics": {"ended/length": line(0.0, 0.9)}}),
    "short limit of evaluations": (
        "responses_cut",
        "evaluation.max_new_tokens",
        {"task": "rft", "metrics": {"eval/questions/truncated": 0.4}, "config": {"evaluation.max_new_tokens": 8}},
    ),
    "collapsed entropy": (
        "entropy_collapse",
        "optimizer.learning_rate",
        {"metrics": {"policy/entropy": lambda done: 0.8 * 0.02**done, "groups/drawn_zero_variance": line(0.3, 0.75)}},
    ),
    "low temperature": ("entropy_collapse", "rollout.temperature", {"metrics": {"policy/entropy": 0.002}}),
    "high temperature": ("entropy_too_high", "rollout.temperature", {"metrics": {"policy/entropy": 5.8}}),
    "exploded entropy": (
        "entropy_too_high",
        "optimizer.learning_rate",
        {"metrics": {"policy/entropy": line(0.3, 6.5)}},
    ),
    "growing mismatch": (
        "mismatch",
        "objective.importance",
        {"metrics": {"mismatch/mean": line(0.004, 0.05)}, "config": {"policy.dtype": "bfloat16"}},
    ),
    "large mismatch": ("mismatch", "objective.importance", {"metrics": {"mismatch/mean": 0.3}}),
    "few positions": ("too_few_positions", "training.total_steps", {"metrics": {"data/passes": line(0.1, 6.0)}}),
    "few windows": (
        "too_few_positions",
        "training.total_steps",
        {"task": "pretrain", "metrics": {"data/passes": line(0.1, 40.0)}},
    ),
    "questions by heart": (
        "questions_memorized",
        "training.total_steps",
        {"task": "rft", "metrics": {"data/passes": line(0.2, 30.0), "reward/drawn_mean": line(0.2, 0.99)}},
    ),
    "short prompts": ("prompts_cut", "prompt.max_tokens", {"metrics": {"data/cut": 0.5}}),
    "slow verifier": (
        "answers_unverified",
        "questions.verifier_seconds",
        {"task": "rft", "metrics": {"status/unverified": 0.2}},
    ),
    "slow prompts": ("device_idle", "data.workers", {"metrics": {"time/data": 2.0}}),
    "slow verifiers": (
        "device_idle",
        "questions.verifier_workers",
        {"task": "rft", "metrics": {"time/verification": 3.0, "time/reward": 3.0}},
    ),
    "frequent checkpoints": ("device_idle", "checkpoint.every_steps", {"metrics": {"time/checkpoint": 2.0}}),
    "one long response": (
        "slots_empty",
        "rollout.decode_slots",
        {"metrics": {"rollout/occupancy": 0.2, "length/max": 60.0}},
    ),
    "changing shapes": (
        "compiling",
        "",
        {"metrics": {"time/compiled_programs": lambda done: float(done > 0.5), "time/compile": 1.5}},
    ),
    "few evaluated positions": (
        "evaluation_too_small",
        "evaluation.positions",
        {"evaluated": {"easy": (0.30, 0.36), "hard": (0.2, 0.3)}, "width": 0.12},
    ),
    "few test questions": (
        "evaluation_too_small",
        "questions.test_questions",
        {"task": "rft", "evaluated": {"questions": (0.3, 0.4)}, "width": 0.2},
    ),
    "forgotten": ("accuracy_fell", "optimizer.learning_rate", {"evaluated": {"easy": (0.5, 0.2)}}),
}


def findings_of(diagnosis: Diagnosis, rule: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.rule == rule]


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_found_with_the_field_to_change(tmp_path: Path, name: str) -> None:
    rule, field, arguments = SICK[name]
    diagnosis = examine(write_run(tmp_path, **arguments))
    [finding] = findings_of(diagnosis, rule)
    assert (finding.changes[0].field if finding.changes else "") == field
    assert finding.sentence.endswith(".") and finding.evidence and finding.severity > Severity.NOTE
    fields = dict(leaves(Experiment())) | {"data.source_options.documents": 1}
    assert {change.field for change in finding.changes} <= set(fields)


def test_every_rule_has_a_sick_run() -> None:
    assert {rule for rule, _, _ in SICK.values()} | {"template_collapse"} == set(RULES)


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("finished", [True, False])
def test_a_healthy_run_is_left_alone(tmp_path: Path, task: str, finished: bool) -> None:
    diagnosis = examine(write_run(tmp_path, task, finished=finished))
    assert not diagnosis.findings
    skipped = {rule.rule for rule in diagnosis.not_checked}
    needed = {rule.name for rule in RULES.choices() if task in rule.requirements.tasks} - {
        "template_collapse",  # No rollouts were kept.
        "answers_unverified" if task == "rpt" else "",
    }
    assert not needed & skipped


def test_answers_of_rpt_are_checked_only_if_they_are_verified(tmp_path: Path) -> None:
    metrics: Any = {"status/unverified": 0.2}
    [plain] = [rule for rule in examine(write_run(tmp_path / "plain")).not_checked if rule.rule == "answers_unverified"]
    assert plain.reason == "it applies to rpt only with objective.reward='verified'"
    run = write_run(tmp_path / "verified", metrics=metrics, config={"objective.reward": "verified"})
    assert findings_of(examine(run), "answers_unverified")


@pytest.mark.parametrize("task", METRICS)
def test_a_short_run_is_left_alone(tmp_path: Path, task: str) -> None:
    diagnosis = examine(write_run(tmp_path, task, steps=2))
    assert not diagnosis.findings
    assert any("2 of the 10 steps" in rule.reason for rule in diagnosis.not_checked)


def test_a_step_that_has_nothing_to_learn_is_not_blamed_on_the_learning_rate(tmp_path: Path) -> None:
    still = {"update/norm": 0.0, "gradient/norm": 0.0, "update/skipped": 1.0} | ZERO_VARIANCE
    assert not findings_of(examine(write_run(tmp_path, metrics=still)), "nothing_moves")


def test_a_learning_rate_that_warms_up_is_not_too_low_yet(tmp_path: Path) -> None:
    slow: Any = {"metrics": {"update/norm": 1e-7}, "config": {"optimizer.warmup_steps": 60}}
    assert "nothing_moves" in dict(examine(write_run(tmp_path, finished=False, **slow)).not_checked)
    assert findings_of(examine(write_run(tmp_path, **slow)), "nothing_moves")


def test_programs_of_evaluations_and_of_the_first_dynamic_sampling_may_compile(tmp_path: Path) -> None:
    dynamic = {
        "groups/rounds": lambda done: 2.0 if done > 0.5 else 1.0,
        "time/compiled_programs": lambda done: float(abs(done - 31 / 60) < 1e-9),
        "time/compile": 60.0,
    }
    assert not findings_of(examine(write_run(tmp_path, metrics=dynamic)), "compiling")


def test_a_run_that_goes_on_is_told_how_often_it_will_see_its_positions(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, finished=False, metrics={"data/passes": line(0.1, 2.0)}, config={"training.total_steps": 600}
    )
    [finding] = findings_of(examine(run), "too_few_positions")
    assert "20.0 times" in finding.sentence


def test_positions_that_are_chosen_again_are_counted_from_then_on(tmp_path: Path) -> None:
    passes = {"data/passes": lambda done: 3.0 * (done % 0.25)}
    chosen = {"data.positions": "self_entropy", "training.total_steps": 6000}
    run = write_run(tmp_path, finished=False, metrics=passes, config=chosen)
    assert not findings_of(examine(run), "too_few_positions")


# --- rollouts -------------------------------------------------------------------------------------------


def test_one_template_for_all_prompts_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=40)
    write_training_rollouts(
        run, 40, lambda step, p: f"So {step} pears: 3" if step > 20 else f"{'abcdefgh'[p]}{step % 7} w{step}"
    )
    [finding] = findings_of(examine(run), "template_collapse")
    assert "so 0 pears: 0" in finding.sentence


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(lambda step, p: f"okay, so I need {step}", id="from_the_start"),
        pytest.param(lambda step, p: f"{'abcdefgh'[p]} w{'xyz'[step % 3]}", id="varied"),
    ],
)
def test_a_template_that_was_there_before_training_is_not_a_collapse(tmp_path: Path, opening: Any) -> None:
    run = write_run(tmp_path, steps=40)
    write_training_rollouts(run, 40, opening)
    diagnosis = examine(run)
    assert "template_collapse" in diagnosis.checked and not findings_of(diagnosis, "template_collapse")


def test_paired_rollouts_show_what_separate_intervals_do_not(tmp_path: Path) -> None:
    """A gain of 5 points at 400 positions: the same positions are right before, and some more after training."""
    before = np.arange(400) < 120
    after = np.arange(400) < 140
    arguments: Any = {"evaluated": {"medium": (0.30, 0.35)}, "width": 0.05}
    assert findings_of(examine(write_run(tmp_path / "intervals", **arguments)), "evaluation_too_small")
    run = write_run(tmp_path / "rollouts", **arguments)
    write_evaluation_rollouts(run, 0, before)
    write_evaluation_rollouts(run, 60, after)
    assert not findings_of(examine(run), "evaluation_too_small")


def test_the_number_of_positions_that_a_gain_needs_is_right(tmp_path: Path) -> None:
    """A difference d of independent scores with variance v needs (2.8)² v / d² positions."""
    rng = np.random.default_rng(0)
    before, after = (rng.permutation(np.arange(200) < count) for count in (60, 68))
    run = write_run(tmp_path, evaluated={"medium": (0.30, 0.34)})
    write_evaluation_rollouts(run, 0, before)
    write_evaluation_rollouts(run, 60, after)
    [finding] = findings_of(examine(run), "evaluation_too_small")
    needed = 2.8**2 * np.var(after.astype(float) - before) / 0.04**2
    told = re.findall(r"about ([\d,]+) ", finding.sentence)
    assert [float(count.replace(",", "")) for count in told] == [pytest.approx(needed, rel=0.15)]


def test_rollouts_of_another_evaluation_are_not_used(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for step in (0, 60):
        write_evaluation_rollouts(run, step, np.zeros(50))
    assert not examine(run).findings
