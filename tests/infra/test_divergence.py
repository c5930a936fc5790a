"""Divergence rules: when they warn, when they stop a run, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.config import DivergenceConfig
from rpt_jax.errors import ExitCode
from rpt_jax.infra.divergence import Diverged, DivergenceMonitor
from tests.helpers.paths import CONFIGS

GOOD = {"reward/drawn_mean": 0.5, "policy/entropy": 1.0, "mismatch/mean": 1e-4}
RULES = DivergenceConfig(window=2, reward_collapse=0.5, entropy_floor=0.3, mismatch_ceiling=0.1)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("reward/drawn_mean", 0.1, "reward_collapse"),
        ("policy/entropy", 0.01, "entropy_floor"),
        ("mismatch/mean", 0.5, "mismatch_ceiling"),
    ],
)
def test_a_broken_rule_warns_once_and_again_after_it_was_kept(name: str, value: float, field: str) -> None:
    monitor, off = DivergenceMonitor(RULES), DivergenceMonitor(DivergenceConfig(window=2))
    bad = GOOD | {name: value}
    said = [
        monitor.check(step, scalars) for step, scalars in enumerate([GOOD, GOOD, bad, bad, bad, GOOD, GOOD, bad, bad])
    ]
    assert [bool(texts) for texts in said] in (
        [False, False, False, True, False, False, False, False, True],
        [False, False, True, False, False, False, False, True, False],
    )
    assert all(f"divergence.{field}" in text and name in text for texts in said for text in texts)
    assert not any(off.check(step, scalars) for step, scalars in enumerate([GOOD, bad, bad, bad]))


def test_a_stop_is_an_exception_and_the_state_survives_a_checkpoint() -> None:
    stopping = DivergenceConfig(**vars(RULES) | {"action": "stop"})
    monitor, again = DivergenceMonitor(stopping), DivergenceMonitor(stopping)
    for step in range(2):
        monitor.check(step, GOOD)
    again.restore(json.loads(json.dumps(monitor.state())))
    with pytest.raises(Diverged, match="step 2, mean of 2 steps: policy/entropy 0.25 < divergence.entropy_floor=0.3"):
        again.check(2, GOOD | {"policy/entropy": -0.5})


def test_main_exits_with_code_4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise Diverged("step 7, mean of 5 steps: policy/entropy 0.1 < divergence.entropy_floor=0.3")

    monkeypatch.setattr(main, "run", diverge)
    arguments = ["main", f"--config={CONFIGS / 'rpt_tiny.py'}", f"--workdir={tmp_path}"]
    assert main.main(arguments) == ExitCode.DIVERGED == 4
    assert "error: the run diverged at step 7" in capsys.readouterr().err
