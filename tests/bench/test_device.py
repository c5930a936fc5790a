"""The bench of a device: parts that fail, hang or are killed, what its file holds, and what a profile adds up to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.bench import __main__ as bench
from rpt_jax.bench.device.command import compare_with_transformers
from rpt_jax.bench.device.profile import KernelEvent, summarize
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.runner import Part, Record, run_parts

# What a stand-in for a part begins with: `send` writes a message.
SEND = "import json, os, sys, time\ndef send(**message): os.write(int(sys.argv[-1]), json.dumps(message).encode() + b'\\n')\n"


def stand_in(name: str, code: str, weight: float = 1.0) -> Part:
    return Part(name=name, weight=weight, command=(sys.executable, "-S", "-c", SEND + textwrap.dedent(code)))


def run_stand_ins(tmp_path: Path, parts: list[Part], seconds: float) -> dict[str, Any]:
    """Run parts, and return what the file holds about them."""
    record = Record(tmp_path / "figures.json", {"format": 1})
    run_parts(parts, seconds, record, tmp_path / "figures.log", os.environ)
    return json.loads((tmp_path / "figures.json").read_text())["parts"]


def test_a_part_that_fails_hangs_or_is_killed_does_not_end_the_others(tmp_path: Path):
    parts = run_stand_ins(
        tmp_path,
        [
            stand_in("fails", "send(figure={'x': 1})\nprint('the reason')\nsys.exit(3)"),
            stand_in("is killed", "send(figure={'x': 2})\nos.kill(os.getpid(), 9)"),
            stand_in("hangs", "send(figure={'x': 3})\ntime.sleep(600)", weight=0.4),
            stand_in("works", "send(machine={'device': 'd'})\nsend(note='n')\nsend(figure={'x': 4})", weight=2.0),
        ],
        seconds=20,
    )
    assert list(parts) == ["fails", "is killed", "hangs", "works"]
    assert [part["status"] for part in parts.values()] == ["failed", "failed", "time limit", "complete"]
    assert [part["figures"] for part in parts.values()] == [[{"x": 1}], [{"x": 2}], [{"x": 3}], [{"x": 4}]]
    assert "code 3" in parts["fails"]["notes"][0] and "the reason" in parts["fails"]["notes"][0]
    assert "code -9" in parts["is killed"]["notes"][0]
    assert (parts["works"]["notes"], parts["works"]["machine"]) == (["n"], {"device": "d"})


def test_a_process_that_a_part_has_started_ends_with_it(tmp_path: Path):
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nsend(figure={'pid': child.pid})\ntime.sleep(600)"
    parts = run_stand_ins(tmp_path, [stand_in("hangs", code)], seconds=3)
    [figure] = parts["hangs"]["figures"]
    wait_until_gone(figure["pid"])


def test_parts_for_which_no_time_is_left_are_named(tmp_path: Path):
    parts = run_stand_ins(
        tmp_path, [stand_in("hangs", "time.sleep(600)", weight=100.0), stand_in("waits", "send(figure={})")], seconds=2
    )
    assert [part["status"] for part in parts.values()] == ["time limit", "not started"]
    assert parts["waits"]["notes"]


def test_what_was_measured_is_kept_if_the_command_is_killed(tmp_path: Path):
    """The part that runs ends too."""
    code = """
        import os
        from pathlib import Path
        from rpt_jax.bench.device.runner import Part, Record, run_parts
        part = Part("part", 1.0, (sys.executable, "-S", "-c", os.environ["PART"]))
        run_parts([part], 600, Record(Path("figures.json"), {}), Path("figures.log"), os.environ)
        """
    # A real part watches its input as this one does.
    part = SEND + "send(figure={'pid': os.getpid()})\nos.read(0, 1)"
    environment = os.environ | {"PART": part, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import sys\n" + textwrap.dedent(code)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    figures = wait_for_figures(tmp_path / "figures.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(figures[0]["pid"])
    assert json.loads((tmp_path / "figures.json").read_text())["parts"]["part"]["status"] == "interrupted"


def wait_for_figures(path: Path) -> list[dict[str, Any]]:
    """Return the figures of the part once there are any."""
    while True:
        parts = json.loads(path.read_text())["parts"] if path.exists() else {}
        if parts and parts["part"]["figures"]:
            return parts["part"]["figures"]
        time.sleep(0.02)


def wait_until_gone(pid: int) -> None:
    """Return when the process has ended, also if nobody has waited for it."""
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.02)


def test_a_report_turns_errors_into_notes_and_writes_valid_json():
    reader, writer = os.pipe()
    report = Report(writer)
    with report.measurement("first"):
        raise ValueError("too large")
    report.figure(name="second", value=1.23456, missing=float("nan"))
    os.close(writer)
    with os.fdopen(reader) as lines:
        note, figure = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert note == {"note": "first: ValueError: too large"}
    assert figure == {"figure": {"name": "second", "value": 1.235, "missing": None}}


def test_kernels_that_overlap_keep_the_device_busy_once():
    events = [KernelEvent("a", 0, 10), KernelEvent("b", 20, 10), KernelEvent("a", 25, 15), KernelEvent("c", 28, 2)]
    summary = summarize(events)
    assert (summary.count, summary.busy, summary.seconds) == (4, 0.75, 40e-9)
    assert summary.longest.startswith("a 68%; b 27%")


def test_the_comparison_takes_the_same_work():
    labels = {"model": "m", "live": 8, "context": 16}
    parts = {
        "rollout": {"figures": [labels | {"with_prefill": 50.0, "tokens_per_second": 70.0}]},
        "update": {
            "figures": [
                labels | {"prompts": name, "tokens_per_second": x} for name, x in (("shared", 30.0), ("repeated", 9.0))
            ]
        },
        "transformers": {
            "figures": [{"work": "bfloat16 matrix product"}]
            + [labels | {"work": work, "tokens_per_second": 10.0} for work in ("rollout", "update, bfloat16 autocast")]
            + [labels | {"work": "rollout", "live": 9, "tokens_per_second": 10.0}]
        },
    }
    assert [ratio["times_transformers"] for ratio in compare_with_transformers(parts)] == [5.0, 3.0]


@pytest.mark.parametrize("arguments", [["--parts=rollout"], ["--json=x.json", "--parts=rollouts"]])
def test_a_wrong_option_is_refused_before_a_device_is_started(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert bench.main(["bench", "device", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: --")
