"""Stop signals in every phase."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from rpt_jax.errors import ExitCode
from tests.helpers.parameters import mostly_slow
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, WITH_SIGNALS


@pytest.fixture
def child() -> Iterator[object]:
    started = []

    def start(*arguments: str, wrapper: Sequence[str] = ()) -> subprocess.Popen[str]:
        run = [*WITH_SIGNALS, *wrapper, sys.executable, "-m", "tests.helpers.stopping_child", *arguments]
        started.append(subprocess.Popen(run, cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("number", mostly_slow(SIGNALS, signal.SIGTERM, signal.SIGUSR1))
def test_a_signal_saves_while_the_main_thread_is_inside_xla(child, number):
    process = child("works", "60")
    process.send_signal(number)
    out, err = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == ExitCode.RESTART and out == "saving\n"
    assert f"{number.name}: stopping within 60 s" in err and "Stopped: step 7." in err


@pytest.mark.parametrize("number", mostly_slow([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_second_signal_exits_at_once(child, number):
    process = child("hangs", "600")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(timeout=CHILD_SECONDS) == 128 + number
    assert "Stopped at once" in process.stderr.read()


@pytest.mark.parametrize(
    ("first", "second"),
    mostly_slow([(signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)], (signal.SIGUSR1, signal.SIGTERM)),
)
def test_a_warning_of_a_scheduler_and_one_sigterm_leave_time_to_save(child, first, second):
    process = child("hangs", "2")
    process.send_signal(first)
    process.send_signal(second)
    assert process.wait(timeout=CHILD_SECONDS) == ExitCode.RESTART
    assert "Nothing was saved within checkpoint.grace_seconds=2" in process.stderr.read()


def test_sighup_stays_ignored_under_nohup(child):
    process = child("works", "60", wrapper=["bash", "-c", "trap '' HUP; exec \"$@\"", "bash"])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == ExitCode.RESTART and err.startswith("SIGTERM: stopping")


def test_the_sigint_of_a_terminal_saves_a_command_that_again_runs(child):
    process = child("works", "60", wrapper=["bash", "launch/again.sh"])
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == ExitCode.RESTART and out == "saving\n"
    assert err.startswith("SIGTERM: stopping") and "Stopped: step 7." in err


def test_work_that_has_nothing_to_save_ends_with_one_line(child):
    process = child("kept", "60")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == ExitCode.RESTART and not out
    assert err.startswith("SIGTERM") and "the complete batches are in runs" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("action", "grace_seconds", "reason"),
    [
        ("hangs", "0.2", "checkpoint.grace_seconds=0.2; the latest checkpoint remains"),
        ("uploads", "1", "The upload did not end within checkpoint.grace_seconds=1"),
    ],
)
def test_neither_a_save_nor_an_upload_takes_longer_than_the_grace_period(child, action, grace_seconds, reason):
    process = child(action, grace_seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=CHILD_SECONDS) == ExitCode.RESTART
    assert reason in process.stderr.read()


def test_a_failed_save_exits_with_the_code_of_a_user_error(child):
    process = child("fails", "60")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=CHILD_SECONDS) == ExitCode.USER_ERROR
    assert "could not be saved (OSError: No space left on device)" in process.stderr.read()


@pytest.mark.parametrize(("action", "reason"), [("writes", "No space left on device"), ("own", "No such file")])
def test_a_thread_that_cannot_write_exits_the_process(child, action, reason):
    process = child(action, "60")
    assert process.wait(timeout=CHILD_SECONDS) == ExitCode.USER_ERROR
    error = process.stderr.read()
    assert error.startswith("error: [Errno ") and reason in error and "Fix this" in error


def test_a_connection_that_another_librarys_thread_has_lost_is_only_reported(child):
    process = child("connects", "60")
    while "ConnectionResetError" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == ExitCode.RESTART and "Stopped: step 7." in err


def test_a_second_signal_does_not_wait_for_an_upload(child):
    process = child("uploads", "600")
    process.send_signal(signal.SIGTERM)
    while "Stopped: step 7." not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=CHILD_SECONDS) == 128 + signal.SIGTERM
    assert "Stopped at once" in process.stderr.read()
