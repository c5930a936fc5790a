"""A run's record: exact on resume, finite, in step with TensorBoard; and a console that obeys nothing it is shown."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import rich
from hypothesis import strategies as st
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from rpt_jax.errors import UserError
from rpt_jax.infra import metrics
from rpt_jax.infra.console import Progress, RolloutText, show_rollouts, table
from rpt_jax.infra.metrics import MetricsWriter, read_metrics


class _NoTensorBoard:
    """Stands in where hundreds of writers are opened: each real one is a thread and a file."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def add_scalar(self, *_: object) -> None: ...

    def close(self) -> None: ...


def _scalars(step: int) -> dict[str, float]:
    return {"reward/mean": 1.0 / (step + 3), "eval/x": 1e-300 * step, "flops/train_total": 3.1e20 * step}


def _write(workdir: Path, steps: range, resume_step: int = -1) -> bytes:
    with MetricsWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, _scalars(step))
    return (workdir / "metrics.jsonl").read_bytes()


def tensorboard_events(workdir: Path) -> Iterator[Event]:
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorboardX.SummaryWriter", _NoTensorBoard)


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    """The shared console as a color terminal of 100 columns."""
    console, output = rich.get_console(), io.StringIO()
    saved = dict(console.__dict__)
    console.__dict__ = Console(file=output, force_terminal=True, force_interactive=True, width=100).__dict__
    yield output
    console.__dict__ = saved


def test_a_line_is_sorted_exact_and_in_the_file_at_once(tmp_path: Path) -> None:
    third = float(np.float32(1) / np.float32(3))
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(0, {"zeta": np.float32(third), "alpha": 0.1, "speed/count": 7})
        line = (tmp_path / "metrics.jsonl").read_text()
    assert line == f'{{"alpha": 0.1, "speed/count": 7.0, "step": 0, "zeta": {third!r}}}\n'
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"alpha": 0.1, "speed/count": 7.0, "step": 0, "zeta": third}]


def test_tensorboard_gets_the_same_scalars_and_one_curve_of_a_run_that_goes_on(tmp_path: Path) -> None:
    _write(tmp_path, range(4))
    first = [(e.step, v.tag, v.simple_value) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    expected = [(step, tag, value) for step in range(4) for tag, value in sorted(_scalars(step).items())]
    assert [row[:2] for row in first] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in first], [row[2] for row in expected], rtol=1e-6, atol=1e-30)

    for path in (tmp_path / "tensorboard").iterdir():
        os.truncate(path, path.stat().st_size // 3)  # As a killed run leaves it, which had not flushed all.
    _write(tmp_path, range(2, 4), resume_step=1)
    again = [(e.step, v.tag, v.simple_value) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    assert again == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_nan_stops_the_run_by_name_and_writes_nothing(tmp_path: Path, no_tensorboard: None, bad: float) -> None:
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(6, {"loss": 1.0})
        with pytest.raises(FloatingPointError, match=r"^step 7: grad/norm=(nan|-?inf), loss=(nan|-?inf)$"):
            writer.write(7, {"reward/mean": 0.5, "loss": bad, "grad/norm": bad})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [6]


def test_steps_grow_and_step_is_no_scalar(tmp_path: Path, no_tensorboard: None) -> None:
    with MetricsWriter(tmp_path, 4) as writer:
        for step, scalars in ((4, {}), (3, {}), (5, {"step": 1.0})):
            with pytest.raises(ValueError, match=f"step {step}"):
                writer.write(step, scalars)
        writer.write(5, {})
        with pytest.raises(ValueError, match="step 5"):
            writer.write(5, {})


def test_resume_after_a_kill_at_any_byte_gives_the_uninterrupted_file(
    tmp_path_factory: pytest.TempPathFactory, no_tensorboard: None
) -> None:
    whole = _write(tmp_path_factory.mktemp("whole"), range(6))
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]

    @hypothesis.settings(deadline=None, max_examples=60)
    @hypothesis.given(cut=st.integers(0, len(whole)), data=st.data())
    def check(cut: int, data: st.DataObject) -> None:
        # A step counts as completed only once its line is there; the newline itself may be what is missing.
        complete = sum(end - 1 <= cut for end in ends)
        resume_step = data.draw(st.integers(-1, complete - 1))
        workdir = tmp_path_factory.mktemp("cut")
        path = workdir / "metrics.jsonl"
        path.write_bytes(whole[:cut])
        assert [line["step"] for line in read_metrics(path)] == list(range(complete))
        assert _write(workdir, range(resume_step + 1, 6), resume_step) == whole
        assert [child.name for child in workdir.iterdir()] == ["metrics.jsonl"]

    check()


def test_a_kill_while_truncating_keeps_the_old_file(
    tmp_path: Path, no_tensorboard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _write(tmp_path, range(5))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert _write(tmp_path, range(2, 5), resume_step=1) == whole


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "a"', b"", b"7", b"[]", b'{"a": 1.0}', b'{"step": 1.5}', b'{"step": 1, "a": NaN}',
             b'{"step": 1, "a": "x"}', b"\xff\xfe", b"\x00" * 8, b'{"step": 0}']
)  # fmt: skip
def test_a_corrupt_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    for use in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, 2)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
            use()
    assert path.read_bytes() == b'{"step": 0}\n' + line + b'\n{"step": 2}\n'


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.metrics\.jsonl is missing"):
        read_metrics(tmp_path / "nowhere" / "metrics.jsonl")


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_leaves_out_the_first_step_and_an_outlier() -> None:
    clock = _Clock()
    progress = Progress("train", total=110, done=10, clock=clock)
    estimates = []
    for seconds in (90.0, 2.0, 2.0, 50.0, 2.0):
        clock.now += seconds
        progress.advance()
        estimates.append(progress.seconds_left)
    assert estimates == [None, 2.0 * 98, 2.0 * 97, 2.0 * 96, 2.0 * 95]


def test_plain_lines_come_first_then_every_ten_seconds_then_last(capsys: pytest.CaptureFixture[str]) -> None:
    clock = _Clock()
    with Progress("train", total=12, clock=clock) as progress:
        for step in range(12):
            clock.now += 60.0 if step == 0 else 4.0
            progress.advance(f"reward {step / 100:.2f} [red]")
    assert capsys.readouterr().out.splitlines() == [
        "train 1/12  elapsed 1:00  ETA -:--  reward 0.00 [red]",
        "train 4/12  elapsed 1:12  ETA 0:32  reward 0.03 [red]",
        "train 7/12  elapsed 1:24  ETA 0:20  reward 0.06 [red]",
        "train 10/12  elapsed 1:36  ETA 0:08  reward 0.09 [red]",
        "train 12/12  elapsed 1:44  ETA 0:00  reward 0.11 [red]",
    ]


def test_a_loop_that_breaks_off_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    clock = _Clock()
    with contextlib.suppress(RuntimeError), Progress("train", total=9000, clock=clock) as progress:
        for seconds in (1.0, 2.0, 2.0):
            clock.now += seconds
            progress.advance()
        raise RuntimeError
    assert capsys.readouterr().out.splitlines()[-1] == "train 3/9000  elapsed 0:05  ETA 4:59:54"


def test_a_terminal_gets_a_bar_that_stays_below_what_is_printed(terminal: io.StringIO) -> None:
    with Progress("train", total=2) as outer:
        outer.advance("reward 0.31 [red]")
        table("Sizes", ["name"], [["prompts"]])
        with Progress("evaluate", total=1) as inner:
            inner.advance()
        outer.advance("reward 0.32 [red]")
    printed = terminal.getvalue()
    assert "\x1b[2K" in printed and "1/1" in printed  # A live line, redrawn in place.
    assert printed.index("prompts") < printed.rindex("2/2")
    assert "reward 0.32 [red]" in printed


def test_a_plain_table_is_markdown_of_full_width(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 40 + "[bold]end[/bold]"
    table("Sizes [b]", ["name", "value"], [["prompts", 12345], [long, 0.123456], ["a\nb\x1b", 1e21]])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "Sizes [b]"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert cells[0] == ["name", "value"]
    assert cells[2:] == [["prompts", "12,345"], [long, "0.1235"], [r"a\nb\x1b", "1e+21"]]


EVIL = (
    b"[bold]b[/bold] [link=http://x]l[/] :smile: \x1b[31mred\x1b]0;t\x07 \r\x08\t\xc2\x9b2J \xe2\x80\xae \xff \\n\nnext"
)


def _show_evil() -> None:
    show_rollouts("step [b]3", [RolloutText(EVIL, EVIL, EVIL, EVIL.replace(b"\xff", b""), 1.0, "right \x1b[2J[b]")])


def _assert_harmless(printed: str) -> None:
    for obeyed in ("\x07", "\r", "\x08", "\t", "\x9b", "\u202e", "😄", "\x1b[31mred", "\x1b]", "\x1b[2J", "\x1b]8"):
        assert obeyed not in printed, repr(obeyed)
    together = "".join(printed.split())
    for shown in ("[bold]b[/bold]", "[link=http://x]l[/]", ":smile:", r"\x1b[31mred\x1b]0;t\x07"):
        assert together.count(shown) == 4, shown
    assert r"\x1b[2J[b]" in printed and "step [b]3" in printed


def test_a_terminal_obeys_nothing_in_model_text(terminal: io.StringIO) -> None:
    _show_evil()
    assert "\x1b[32m" in terminal.getvalue()  # Our own colors are on, so nothing was merely switched off.
    _assert_harmless(terminal.getvalue())


def test_a_log_file_holds_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    _show_evil()
    printed = capsys.readouterr().out
    _assert_harmless(printed)
    assert all(character.isprintable() or character == "\n" for character in printed)


def test_rollouts_show_spaces_newlines_broken_bytes_and_a_missing_prediction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = b"HEAD" + b"x" * 2000 + b" its tail"
    reasoning = b"START" + b"y" * 5000 + b"STOP"
    show_rollouts(
        "step 50",
        [
            RolloutText(prompt, reasoning, b" 4", b" 4 apples\n", 1.0, "correct"),
            RolloutText(b"p", b"", None, b"\xc3", 0.0, "no box"),
        ],
    )
    printed = capsys.readouterr().out
    for shown in ("step 50, rollout 1 of 2", "its tail", "START", "STOP", "' 4'", r"' 4 apples\n'", "1  correct"):
        assert shown in printed
    for shown in ("step 50, rollout 2 of 2", "(none)", r"b'\xc3'", "0  no box"):
        assert shown in printed
    assert "HEAD" not in printed and len(printed) < 6000


def test_a_console_that_knows_ascii_only_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    console = rich.get_console()
    saved = dict(console.__dict__)
    console.__dict__ = Console(file=output, width=80).__dict__
    try:
        show_rollouts("é", [RolloutText("é".encode(), b"", "é".encode(), b"", 0.0)])
        table("ü", ["ö"], [["é"]])
        progress = Progress("ß", total=1)
        progress.advance("é")
    finally:
        console.__dict__ = saved
    printed = raw.getvalue()
    assert printed.count(rb"\xe9") == 5  # The title, the prompt, the prediction, a cell and a status.
    assert all(name in printed for name in (rb"\xfc", rb"\xf6", rb"\xdf 1/1"))
