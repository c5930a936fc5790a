"""The loop of an evaluation and the results that it keeps."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from rpt_jax.errors import UserError
from rpt_jax.evaluation.batch_loop import DeviceClock, run_batches
from rpt_jax.evaluation.stored_results import ResultStore, read_results

SETTINGS = {"--suite": "questions", "rollout.temperature": 0.8}


class Numbers:
    """Batches of one number each, that note what is called; `fails` raises when that batch is verified."""

    def __init__(self, count: int, fails: int = -1):
        self.count = count
        self.calls: list[str] = []
        self.fails = fails

    def launch(self, batch: int) -> Any:
        self.calls.append(f"launch {batch}")
        return {"number": batch}

    def verify(self, batch: int, arrays: Any) -> Callable[[], list[dict[str, Any]]]:
        self.calls.append(f"verify {batch}")
        if batch == self.fails:
            raise KeyboardInterrupt

        def records() -> list[dict[str, Any]]:
            self.calls.append(f"wait {batch}")
            return [{"id": str(batch), "square": arrays["number"] ** 2}]

        return records


def test_devices_and_verifiers_have_work_while_a_batch_is_waited_for(tmp_path: Path):
    batches = Numbers(4)
    share = run_batches("test", batches, ResultStore(tmp_path, SETTINGS))
    calls = (
        "launch 0, launch 1, verify 0, launch 2, verify 1, wait 0, launch 3, verify 2, wait 1, verify 3, wait 2, wait 3"
    )
    assert batches.calls == calls.split(", ")
    assert share is not None and 0 <= share <= 1


def test_interrupted_evaluation_goes_on_after_its_last_batch(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run_batches("test", Numbers(4, fails=3), ResultStore(tmp_path, SETTINGS))
    rest = Numbers(4)
    store = ResultStore(tmp_path, SETTINGS)
    run_batches("test", rest, store)
    assert [call for call in rest.calls if "launch" in call] == ["launch 2", "launch 3"]
    assert [record["square"] for record in store.read(4)] == [0, 1, 4, 9]
    assert run_batches("test", Numbers(4), store) is None


def test_finished_evaluation_has_one_line_a_question_and_one_summary(tmp_path: Path):
    store = ResultStore(tmp_path, SETTINGS)
    run_batches("test", Numbers(2), store)
    assert store.summary() is None
    store.finish([record | {"category": "", "scores": {}} for record in store.read(2)], {"suite": "s", "policy": "p"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "records.jsonl", "settings.json"]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "evaluation.json").read_text()) == ResultStore(tmp_path, SETTINGS).summary()
    assert read_results(tmp_path, "--results")[1][1] == {"id": "1", "square": 1, "category": "", "scores": {}}


@pytest.mark.parametrize("file", ["evaluation.json", "settings.json", "batches/000001.jsonl"])
@pytest.mark.parametrize("content", [b'{"id": "0', b"\xff", b"[]"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes):
    run_batches("test", Numbers(2), ResultStore(tmp_path, SETTINGS))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged. Give --restart") as raised:
        ResultStore(tmp_path, SETTINGS).read(2)
    assert raised.value.field == "--workdir"
    ResultStore(tmp_path, SETTINGS, restart=True)


def test_results_of_other_settings_are_kept_unless_a_restart_is_asked_for(tmp_path: Path):
    run_batches("test", Numbers(2), ResultStore(tmp_path, SETTINGS))
    other = SETTINGS | {"rollout.temperature": 0.6}
    with pytest.raises(UserError, match=r"rollout\.temperature: 0\.8 there, 0\.6 now") as raised:
        ResultStore(tmp_path, other)
    assert raised.value.field == "--workdir"
    assert ResultStore(tmp_path, SETTINGS).has(1)
    assert not ResultStore(tmp_path, other, restart=True).has(0)


def test_batches_of_other_questions_are_not_continued(tmp_path: Path):
    store = ResultStore(tmp_path, SETTINGS)
    store.check_evaluated("some questions")
    ResultStore(tmp_path, SETTINGS).check_evaluated("some questions")
    with pytest.raises(UserError) as raised:
        ResultStore(tmp_path, SETTINGS).check_evaluated("other questions")
    assert raised.value.field == "--workdir"
    ResultStore(tmp_path, SETTINGS, restart=True).check_evaluated("other questions")


def test_results_of_an_unfinished_evaluation_cannot_be_read(tmp_path: Path):
    ResultStore(tmp_path, SETTINGS)
    with pytest.raises(UserError) as raised:
        read_results(tmp_path, "--results")
    assert raised.value.field == "--results"


class Launch:
    """An array that is ready at a given time of a clock that tests set."""

    def __init__(self) -> None:
        self.ready = threading.Event()

    def block_until_ready(self) -> None:
        self.ready.wait()


def busy_share(runs: list[tuple[float, float, float, bool]]) -> float:
    """Return the share of a clock that is set by hand.

    Args:
      runs: for each launch, when it is called, when it returns and when the devices end; and whether it compiles a program.
    """
    now = 0.0
    clock = DeviceClock(lambda: now)
    with clock:
        for began, launched, end, compiles in runs:
            launch = Launch()

            def start(launch: Launch = launch, launched: float = launched, compiles: bool = compiles) -> Launch:
                nonlocal now
                if compiles:
                    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
                now = launched
                return launch

            now = began
            clock.launch(start)
            now = end
            launch.ready.set()
            clock.wait()
        return clock.busy_share()


def test_share_of_the_time_in_which_devices_compute():
    """The devices compute from 0 to 4 and from 4 to 6, for launches at 0 and 1, and from 8 to 10 for one at 8."""
    assert busy_share([(0, 0, 4, False), (1, 1, 6, False), (8, 8, 10, False)]) == pytest.approx((4 + 2 + 2) / 10)


def test_time_in_which_programs_are_compiled_is_left_out():
    """The first launch compiles before it starts; the second compiles from 4 to 9, while the devices compute until 5."""
    assert busy_share([(0, 3, 5, True), (4, 9, 10, True), (12, 12, 13, False)]) == pytest.approx((1 + 1 + 1) / 5)


def test_share_of_devices_that_never_wait():
    assert busy_share([(0, 7, 9, True), (8, 8, 12, False)]) == pytest.approx(1.0)


def test_devices_that_return_from_a_launch_at_its_end_are_busy_from_its_call():
    assert busy_share([(0, 4, 4, False), (5, 9, 9, False), (9, 10, 10, False)]) == pytest.approx((4 + 4 + 1) / 10)
