"""Console output: progress, tables, rollouts and log messages; nothing in a model's text is interpreted."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import pytest
import rich
from rich.console import Console

from rpt_jax.infra.console import Progress, RolloutText, console_logging, show_rollouts, silent_console, table


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    """Make the shared console a color terminal with 100 columns."""
    console, output = rich.get_console(), io.StringIO()
    saved = dict(console.__dict__)
    console.__dict__ = Console(file=output, force_terminal=True, force_interactive=True, width=100).__dict__
    yield output
    console.__dict__ = saved


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_ignores_the_first_step_and_an_outlier() -> None:
    clock = FakeClock()
    progress = Progress("train", total=110, done=10, clock=clock)
    estimates = []
    for seconds in (90.0, 2.0, 2.0, 50.0, 2.0):
        clock.now += seconds
        progress.advance()
        estimates.append(progress.seconds_left)
    assert estimates == [None, 2.0 * 98, 2.0 * 97, 2.0 * 96, 2.0 * 95]


def test_the_estimate_counts_evaluations_apart_from_steps() -> None:
    """Nine steps of 2 s, of which every third is followed by an evaluation of 7 s, and the last by one of 30 s."""
    clock = FakeClock()

    def interludes_left(done: int) -> dict[str, int]:
        return {"evaluation": 3 - -(-done // 3), "full evaluation": 1}

    progress = Progress("train", total=9, clock=clock, interludes_left=interludes_left)
    estimates = {}
    with progress.interlude("full evaluation"):
        clock.now += 30.0
    for step in range(1, 10):
        clock.now += 2.0
        progress.advance()
        estimates[step] = progress.seconds_left
        if step % 3 == 0 and step < 9:
            with progress.interlude("evaluation"):
                clock.now += 7.0
    assert estimates[1] is None and estimates[2] == 7 * 2.0 + 30.0, "no evaluation was measured yet"
    assert estimates[4] == 5 * 2.0 + 7.0 + 30.0 and estimates[9] == 30.0


def test_what_has_not_happened_yet_is_expected_to_be_like_something_else() -> None:
    """Six steps of 2 s, of which 1 s is sampling; the last three sample more. Compilation does not count."""
    clock = FakeClock()
    compiled = 0.0

    progress = Progress(
        "train",
        total=6,
        clock=clock,
        interludes_left=lambda done: {"more sampling": min(3, 6 - done), "evaluation": 1 if done < 6 else 0},
        alike={"more sampling": ("sampling", 2.0), "evaluation": ("full evaluation", 0.5)},
        compile_seconds=lambda: compiled,
    )
    with progress.interlude("full evaluation"):
        clock.now += 50.0
        compiled += 30.0
    for step in range(1, 7):
        if step >= 4:
            with progress.interlude("more sampling"):
                clock.now += 3.0
        with progress.part("sampling"):
            clock.now += 1.0
        clock.now += 1.0
        progress.advance()
        if step == 2:
            assert progress.seconds_left == 4 * 2.0 + 3 * (2 * 1.0) + 0.5 * (50.0 - 30.0)
        if step == 4:
            assert progress.seconds_left == 2 * 2.0 + 2 * 3.0 + 0.5 * (50.0 - 30.0)


def test_a_short_loop_inside_another_one_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    for seconds in (1.0, 6.0):
        with Progress("evaluate", total=3, transient=True, clock=clock) as progress:
            for _ in range(3):
                clock.now += seconds
                progress.advance()
    assert capsys.readouterr().out.splitlines() == ["evaluate 2/3  elapsed 0:12  ETA 0:06"]


def test_plain_lines_are_printed_first_every_ten_seconds_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
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


def test_an_interrupted_loop_prints_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    with contextlib.suppress(RuntimeError), Progress("train", total=9000, clock=clock) as progress:
        for seconds in (1.0, 2.0, 2.0):
            clock.now += seconds
            progress.advance()
        raise RuntimeError
    assert capsys.readouterr().out.splitlines()[-1] == "train 3/9000  elapsed 0:05  ETA 4:59:54"


def test_a_terminal_shows_a_bar_below_printed_text(terminal: io.StringIO) -> None:
    with Progress("train", total=2) as outer:
        outer.advance("reward 0.31 [red]")
        table("Sizes", ["name"], [["prompts"]])
        with Progress("evaluate", total=1) as inner:
            inner.advance()
        outer.advance("reward 0.32 [red]")
    printed = terminal.getvalue()
    assert "\x1b[2K" in printed and "1/1" in printed  # A live line is redrawn in place.
    assert printed.index("prompts") < printed.rindex("2/2")
    assert "reward 0.32 [red]" in printed


def test_a_plain_table_is_markdown_of_unlimited_width(capsys: pytest.CaptureFixture[str]) -> None:
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


def show_evil() -> None:
    show_rollouts("step [b]3", [RolloutText(EVIL, EVIL, EVIL, EVIL.replace(b"\xff", b""), 1.0, "right \x1b[2J[b]")])


def assert_harmless(printed: str) -> None:
    for control in ("\x07", "\r", "\x08", "\t", "\x9b", "\u202e", "😄", "\x1b[31mred", "\x1b]", "\x1b[2J", "\x1b]8"):
        assert control not in printed, repr(control)
    unwrapped = "".join(printed.split())
    for shown in ("[bold]b[/bold]", "[link=http://x]l[/]", ":smile:", r"\x1b[31mred\x1b]0;t\x07"):
        assert unwrapped.count(shown) == 4, shown
    assert r"\x1b[2J[b]" in printed and "step [b]3" in printed


def test_control_sequences_in_model_text_are_escaped_on_a_terminal(terminal: io.StringIO) -> None:
    show_evil()
    assert "\x1b[32m" in terminal.getvalue()  # Our own colors work, so escapes are not just disabled.
    assert_harmless(terminal.getvalue())


def test_a_log_file_contains_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    show_evil()
    printed = capsys.readouterr().out
    assert_harmless(printed)
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


def test_an_ascii_console_gets_escapes_instead_of_an_error() -> None:
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


def test_log_messages_go_to_stdout_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("rpt_jax.some.module")
    with console_logging():
        logger.info("step %d [red] of %s", 3, "x" * 200)
        logger.warning("the reward collapsed")
        logger.debug("a detail")
        with silent_console():
            logger.info("hidden")
            logger.warning("hidden")
            table("hidden", ["hidden"], [])
    logger.info("after the run")
    out, err = capsys.readouterr()
    assert out == f"step 3 [red] of {'x' * 200}\n"
    assert err == "warning: the reward collapsed\n"
