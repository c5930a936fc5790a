"""Trackers, with a stand-in that keeps what it is given; tests/slow/test_trackers.py has the real ones."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import Experiment, LoggingConfig, from_config_dict
from rpt_jax.errors import UserError
from rpt_jax.infra import trackers
from rpt_jax.infra.metrics import MetricsWriter
from rpt_jax.infra.trackers import Trackers, check_installed
from tests.helpers.run_pages import make_rollouts


class StandIn(types.ModuleType):
    """A tracker that keeps calls: of `init`, of `log` by the id or the name of the run, and the number of finished runs."""

    def __init__(self) -> None:
        super().__init__("tracker")
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[str, int, dict[str, Any]]] = []
        self.finished = 0
        self.failures: set[str] = set()

    def init(self, **arguments: Any) -> types.SimpleNamespace:
        self.fail("init")
        self.starts.append(arguments)
        run = arguments.get("id") or arguments["name"]

        def log(values: dict[str, Any], step: int) -> None:
            self.fail("log")
            self.logged.append((run, step, values))

        def finish() -> None:
            self.fail("finish")
            self.finished += 1

        return types.SimpleNamespace(log=log, finish=finish)

    def fail(self, function: str) -> None:
        if function in self.failures:
            raise ConnectionError("no network")

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return monkeypatched("wandb", monkeypatch)


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return monkeypatched("trackio", monkeypatch)


def monkeypatched(name: str, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in


def write(workdir: Path, names: str, steps: range, resume_step: int = -1) -> None:
    experiment = Experiment(logging=LoggingConfig(trackers=names))
    with MetricsWriter(workdir, resume_step, Trackers(experiment, workdir)) as writer:
        for step in steps:
            writer.write(step, {"loss": float(step)})


def test_a_resumed_run_continues_its_run_at_each_tracker(tmp_path: Path, wandb: StandIn, trackio: StandIn) -> None:
    """Steps that are repeated after an interruption are not logged twice."""
    workdir = tmp_path / "tiny"
    write(workdir, "wandb, trackio", range(4))
    write(workdir, "wandb, trackio", range(2, 6), resume_step=1)
    assert [(step, values) for _, step, values in wandb.logged] == [(s, {"loss": float(s)}) for s in range(6)]
    assert len({run for run, _, _ in wandb.logged}) == 1 and wandb.finished == 2
    assert wandb.starts[0]["config"]["training.total_steps"] == Experiment().training.total_steps
    assert len({run for run, _, _ in trackio.logged}) == 1 and trackio.logged[0][0].startswith("tiny-")

    write(tmp_path / "other", "wandb", range(1))
    assert wandb.starts[2]["id"] != wandb.starts[1]["id"] == wandb.starts[0]["id"]


def test_a_tracker_that_is_added_later_gets_the_steps_before(tmp_path: Path, wandb: StandIn, trackio: StandIn) -> None:
    write(tmp_path, "wandb", range(4))
    write(tmp_path, "wandb,trackio", range(3, 5), resume_step=2)
    assert [step for _, step, _ in wandb.logged] == [step for _, step, _ in trackio.logged] == list(range(5))


def test_rollouts_are_a_table(tmp_path: Path, wandb: StandIn) -> None:
    rollouts = make_rollouts(1, 2, 3, split="train")
    experiment = Experiment(logging=LoggingConfig(trackers="wandb"))
    with MetricsWriter(tmp_path, -1, Trackers(experiment, tmp_path)) as writer:
        writer.show_table("rollouts", 1, lambda: rollouts)
    [(_, step, values)] = wandb.logged
    columns, rows = values["rollouts"]
    assert step == 1 and [dict(zip(columns, row, strict=True)) for row in rows] == rollouts.to_pylist()


@pytest.mark.parametrize("function", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path, wandb: StandIn, trackio: StandIn, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    wandb.failures.add(function)
    with caplog.at_level(logging.WARNING):
        write(tmp_path, "wandb,trackio", range(3))
    [record] = [record for record in caplog.records if record.name == trackers.__name__]
    assert "wandb" in record.getMessage() and "no network" in record.getMessage()
    assert len(trackio.logged) == 3 and trackio.finished == 1
    # The next start tries again; what could not be begun is begun then.
    wandb.failures.clear()
    write(tmp_path, "wandb,trackio", range(3, 4), resume_step=2)
    expected = {"init": [0, 1, 2, 3], "log": [3], "finish": [0, 1, 2, 3]}[function]
    assert [step for _, step, _ in wandb.logged] == expected


def test_only_the_leader_logs(tmp_path: Path, wandb: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "is_leader", lambda: False)
    Trackers(Experiment(logging=LoggingConfig(trackers="wandb")), tmp_path).log(1, {"loss": 1.0})
    assert not wandb.starts and not list(tmp_path.iterdir())


def test_a_missing_package_and_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install") as raised:
        check_installed(LoggingConfig(trackers="wandb"))
    assert raised.value.field == "logging.trackers"
    for override, field in (("logging.trackers=wandbb", "logging.trackers"), ("logging.project=x", "logging.project")):
        with pytest.raises(UserError) as raised:
            from_config_dict({}, [override])
        assert raised.value.field == field
