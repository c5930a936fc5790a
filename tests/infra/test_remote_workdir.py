"""The lock of a workdir in object storage, and its uploads, with fsspec's file system in memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import fsspec
import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra import remote_workdir
from rpt_jax.infra.remote_workdir import LockLost, RemoteLock, local_workdir
from rpt_jax.infra.signals import StopSignals
from rpt_jax.infra.storage import RemoteCopy, push
from tests.helpers.memory_files import URL, empty_memory_files

LOCK = "/bucket/run/lock"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """The file system in memory, empty, a cache directory of the test's own, and locks that become stale at once."""
    monkeypatch.setattr(remote_workdir, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(remote_workdir, "STALE_SECONDS", 0.2)
    return empty_memory_files(tmp_path, monkeypatch)


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What threads raise."""
    raised: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: raised.append(failure.exc_value))
    return raised


def wait_for_failure(failures: list[BaseException | None]) -> None:
    deadline = time.monotonic() + 60
    while not failures and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_path_is_its_own_workdir(tmp_path: Path) -> None:
    with local_workdir(str(tmp_path / "run"), StopSignals()) as workdir:
        assert workdir == tmp_path / "run" and not workdir.exists()


def test_what_a_run_writes_is_at_the_url_after_it(files: fsspec.AbstractFileSystem) -> None:
    with local_workdir(URL, StopSignals()) as workdir:
        assert files.exists(LOCK)
        (workdir / "metrics.jsonl").write_text("{}")
    assert files.cat_file("/bucket/run/metrics.jsonl") == b"{}"
    assert not files.exists(LOCK)


def test_what_a_run_wrote_before_an_error_is_at_the_url(files: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(ZeroDivisionError), local_workdir(URL, StopSignals()) as workdir:
        (workdir / "metrics.jsonl").write_text("{}")
        raise ZeroDivisionError
    assert files.exists("/bucket/run/metrics.jsonl") and not files.exists(LOCK)


def test_a_stop_signal_uploads_before_the_process_ends(files: fsspec.AbstractFileSystem) -> None:
    signals = StopSignals()
    told: list[str] = []
    signals.on_exit = lambda code, message: told.append(message)
    with local_workdir(URL, signals) as workdir:
        (workdir / "metrics.jsonl").write_text("{}")
        signals.on_exit(75, "stopped")
        assert files.exists("/bucket/run/metrics.jsonl") and not files.exists(LOCK)
    assert told == ["stopped"]


def test_a_workdir_in_use_is_refused(files: fsspec.AbstractFileSystem) -> None:
    with local_workdir(URL, StopSignals()):
        with pytest.raises(UserError, match="in use by another run") as raised, local_workdir(URL, StopSignals()):
            pass
    assert raised.value.field == "--workdir"


def test_several_jobs_score_shards_in_one_workdir(files: fsspec.AbstractFileSystem) -> None:
    with local_workdir(URL, StopSignals(), is_shared=True), local_workdir(URL, StopSignals(), is_shared=True):
        assert not files.exists(LOCK)


@pytest.mark.parametrize("content", [b'{"run": "killed", "host": "other"}', b"damaged"])
def test_the_lock_of_a_killed_run_is_taken_over(files: fsspec.AbstractFileSystem, content: bytes) -> None:
    files.pipe_file(LOCK, content)
    with local_workdir(URL, StopSignals()):
        assert files.cat_file(LOCK) != content


def test_a_run_whose_lock_was_taken_over_ends_and_uploads_nothing_more(
    files: fsspec.AbstractFileSystem, failures: list[BaseException | None]
) -> None:
    with local_workdir(URL, StopSignals()) as workdir:
        files.pipe_file(LOCK, b'{"run": "another", "host": "other"}')
        wait_for_failure(failures)
        (workdir / "metrics.jsonl").write_text("{}")
    assert isinstance(failures[0], LockLost) and "other" in str(failures[0])
    assert not files.exists("/bucket/run/metrics.jsonl")
    assert files.exists(LOCK)


def test_a_run_that_cannot_upload_for_long_ends_without_another_attempt(
    files: fsspec.AbstractFileSystem, failures: list[BaseException | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[RemoteCopy] = []

    def fail(copy: RemoteCopy) -> None:
        attempts.append(copy)
        raise OSError("no answer")

    monkeypatch.setattr(remote_workdir, "PUSH_SECONDS", 0.01)
    monkeypatch.setattr(remote_workdir, "GIVE_UP_SECONDS", 0.0)
    monkeypatch.setattr(RemoteCopy, "push", fail)
    with local_workdir(URL, StopSignals()):
        wait_for_failure(failures)
    assert isinstance(failures[0], OSError) and "no answer" in str(failures[0])
    assert len(attempts) == 1


def test_two_runs_that_take_over_one_lock_do_not_both_get_it(files: fsspec.AbstractFileSystem) -> None:
    files.pipe_file(LOCK, b'{"run": "killed"}')
    copy = RemoteCopy.at(URL)
    outcomes: list[str] = []
    done = threading.Barrier(2)

    def take() -> None:
        try:
            with RemoteLock(copy):
                outcomes.append("locked")
                done.wait(60)
        except UserError:
            outcomes.append("refused")
            done.wait(60)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("locked") <= 1


def test_another_process_of_the_run_has_a_copy_of_its_own(files: fsspec.AbstractFileSystem) -> None:
    with local_workdir(URL, StopSignals()) as workdir:
        (workdir / "a").write_text("x")
        push(workdir)
        with local_workdir(URL, StopSignals(), process=1) as other:
            assert other != workdir and (other / "a").read_text() == "x"
