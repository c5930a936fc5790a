"""Divergence rules: what breaks them, when they speak, and what a stop looks like from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.config import DivergenceConfig, Experiment
from rpt_jax.infra.divergence import Diverged, DivergenceMonitor

GOOD = {"reward/mean": 0.5, "policy/entropy": 1.0, "mismatch/mean": 1e-4}
RULES = DivergenceConfig(window=2, reward_collapse=0.5, entropy_floor=0.3, mismatch_ceiling=0.1)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("reward/mean", 0.1, "reward_collapse"),
        ("policy/entropy", 0.01, "entropy_floor"),
        ("mismatch/mean", 0.5, "mismatch_ceiling"),
    ],
)
def test_a_rule_speaks_once_when_the_mean_breaks_it(name: str, value: float, field: str) -> None:
    watch, off = DivergenceMonitor(RULES), DivergenceMonitor(DivergenceConfig(window=2))
    bad = GOOD | {name: value}
    said = [
        watch.check(step, scalars) for step, scalars in enumerate([GOOD, GOOD, bad, bad, bad, GOOD, GOOD, bad, bad])
    ]
    assert [bool(texts) for texts in said] in (
        [False, False, False, True, False, False, False, False, True],
        [False, False, True, False, False, False, False, True, False],
    )
    assert all(f"divergence.{field}" in text and name in text for texts in said for text in texts)
    assert not any(off.check(step, scalars) for step, scalars in enumerate([GOOD, bad, bad, bad]))


def test_a_stop_is_an_exception_and_survives_a_checkpoint() -> None:
    stopping = DivergenceConfig(**vars(RULES) | {"action": "stop"})
    watch, again = DivergenceMonitor(stopping), DivergenceMonitor(stopping)
    for step in range(2):
        watch.check(step, GOOD)
    again.restore(json.loads(json.dumps(watch.state())))
    with pytest.raises(Diverged, match="step 2, mean of 2 steps: policy/entropy 0.25 < divergence.entropy_floor=0.3"):
        again.check(2, GOOD | {"policy/entropy": -0.5})


def test_main_exits_with_code_4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def diverge(*_: object) -> None:
        raise Diverged("step 7, mean of 5 steps: policy/entropy 0.1 < divergence.entropy_floor=0.3")

    monkeypatch.setattr(main, "run", diverge)
    monkeypatch.setattr(main, "load_experiment", lambda argv: Experiment())
    monkeypatch.setattr(main, "_WORKDIR", type("Flag", (), {"value": str(tmp_path)}))
    monkeypatch.setattr(main, "_DESCRIBE", type("Flag", (), {"value": False}))
    assert main.main(["main"]) == 4
    assert "error: the run diverged at step 7" in capsys.readouterr().err
