"""A workdir in object storage: its lock, and the thread that keeps it up to date while a run writes to the local copy."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rpt_jax.config.user_paths import is_url, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.signals import StopSignals
from rpt_jax.infra.storage import LOCK, RemoteCopy, reason, usable_or_user_error

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0  # The owner of a lock rewrites it this often.
STALE_SECONDS = 60.0  # A lock that was not rewritten for this long is of a run that was killed.
PUSH_SECONDS = 30.0  # Changes are uploaded this often.
_PAUSES = 10  # The pause after an upload, in multiples of its duration, up to the longest pause.
LONGEST_PAUSE_SECONDS = 300.0
GIVE_UP_SECONDS = 600.0  # A run ends if nothing could be uploaded for this long.


@contextlib.contextmanager
def local_workdir(location: str, signals: StopSignals, *, process: int = 0, is_shared: bool = False) -> Iterator[Path]:
    """Give the local directory for a workdir: of a path, the path itself, and of a URL, a copy.

    The copy begins as what is at the URL, so a run resumes on any machine. Inside the block, process 0 has the workdir's lock and
    uploads what changes; what is left is uploaded at the end, also after a stop signal.

    Args:
      location: `--workdir`.
      signals: of the process.
      process: index of this process. Others than 0 neither lock nor upload.
      is_shared: whether other runs may write to the workdir at the same time; then it is not locked.

    Raises: UserError, if the URL cannot be used or another run uses the workdir, and OSError, if the upload at the end fails.
    """
    if not is_url(location):
        yield user_path(location)
        return
    copy = RemoteCopy.at(location, use=f"workdir of process {process}")
    with RemoteLock(copy) if process == 0 and not is_shared else contextlib.nullcontext() as lock:
        # Other jobs on this machine may be writing to the copy of a shared workdir.
        copy.fetch("--workdir", reset=not is_shared)
        if process:
            yield copy.root
            return
        uploads = _Uploads(copy, lock)
        earlier_on_exit = signals.on_exit

        def on_exit(code: int, message: str) -> None:
            uploads.close_or_warn()
            if earlier_on_exit:
                earlier_on_exit(code, message)

        signals.on_exit = on_exit
        try:
            yield copy.root
        except BaseException:
            uploads.close_or_warn()
            raise
        finally:
            signals.on_exit = earlier_on_exit
        uploads.close()


class RemoteLock:
    """The lock of a workdir in object storage: an object that is only created if there is none, and rewritten every few seconds.

    After a kill it stays, and the next run waits `STALE_SECONDS` before it takes it over. Two runs that take over the same lock
    at the same moment are told apart a moment later, when one of them finds the other's name in it.
    """

    def __init__(self, copy: RemoteCopy):
        self._url = copy.url
        self._copy = copy
        self._owner = {"host": socket.gethostname(), "process": os.getpid(), "run": uuid.uuid4().hex}

    def __enter__(self) -> RemoteLock:
        """Raises: UserError, if another run has the lock or the URL cannot be written to."""
        with usable_or_user_error("--workdir", self._url):
            self._files, directory = self._copy.open()
            self._path = f"{directory}/{LOCK}"
            if not self._create():
                self._take_over()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Delete the lock if it is still this run's. It does not matter if that fails: the lock becomes stale."""
        with contextlib.suppress(Exception):
            if self._is_ours(self._read()):
                self._files.rm_file(self._path)

    def beat(self) -> None:
        """Rewrite the lock. Raises: OSError, if another run has taken it over; anything else if it cannot be written."""
        found = self._read()
        if not self._is_ours(found):
            raise LockLost(
                f"{self._url} was taken over by another run ({_describe(found)}), because this one could not reach it for "
                f"{STALE_SECONDS:g} s"
            )
        self._files.pipe_file(self._path, self._content())

    def _create(self) -> bool:
        """Create the lock; return False if it exists."""
        try:
            self._files.pipe_file(self._path, self._content(), mode="create")
        except Exception:  # noqa: BLE001 - what packages for object storage raise if it exists differs.
            if self._read() is None:
                raise
        return self._is_ours(self._read())

    def _take_over(self) -> None:
        """Wait until the lock is stale, and replace it. Raises: UserError, if its owner is alive."""
        found = self._read()
        logger.info("%s is locked by %s: waiting %g s for a sign of life.", self._url, _describe(found), STALE_SECONDS)
        start = time.monotonic()
        while (now := self._read()) == found and time.monotonic() < start + STALE_SECONDS:
            time.sleep(BEAT_SECONDS / 10)
        if now is not None:
            if now != found:
                raise self._in_use(now)
            self._files.rm_file(self._path)
        if not self._create():
            raise self._in_use(self._read())
        time.sleep(BEAT_SECONDS / 5)
        if not self._is_ours(now := self._read()):
            raise self._in_use(now)

    def _in_use(self, found: dict[str, Any] | None) -> UserError:
        return UserError(
            f"--workdir={self._url} is in use by another run ({_describe(found)}). Wait until it ends, or choose another "
            "--workdir.",
            field="--workdir",
        )

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("run") == self._owner["run"]

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "time": time.time()}).encode()

    def _read(self) -> dict[str, Any] | None:
        """Return the content of the lock, None if there is none."""
        self._files.invalidate_cache()
        try:
            content = json.loads(self._files.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        return content if isinstance(content, dict) else {}


class LockLost(OSError):
    """Another run has the lock of the workdir."""


def _describe(found: dict[str, Any] | None) -> str:
    found = found or {}
    return f"process {found.get('process', 'unknown')} on {found.get('host', 'an unknown host')}"


class _Uploads:
    """Threads that rewrite the lock and upload what has changed in a copy, until it is closed.

    An OSError in one of them ends the run (see `StopSignals.handle`): another run has the lock, or nothing could be written for a
    long time.
    """

    def __init__(self, copy: RemoteCopy, lock: RemoteLock | None):
        self._copy = copy
        self._lock = lock
        self._closing = threading.Event()
        self._is_closed = threading.Lock()  # Taken once.
        self._has_failed = False
        self._threads = [threading.Thread(target=self._repeat, args=(copy.push, PUSH_SECONDS), daemon=True)]
        if lock:
            self._threads.append(threading.Thread(target=self._repeat, args=(lock.beat, BEAT_SECONDS), daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Upload what is left and release the lock, unless a thread has failed. Another call does nothing. Raises: OSError."""
        if not self._is_closed.acquire(blocking=False):
            return
        self._closing.set()
        for thread in self._threads:
            if thread is not threading.current_thread() and not self._has_failed:
                thread.join()
        if not self._has_failed:
            self._copy.push()
            if self._lock:
                self._lock.release()

    def close_or_warn(self) -> None:
        """Call `close`, and log what it raises: the process is about to end for another reason."""
        try:
            self.close()
        except OSError as error:
            logger.warning("%s; it may lack what was written last.", error)

    def _repeat(self, function: Callable[[], None], seconds: float) -> None:
        """Call a function again and again. Raises: OSError, see above."""
        succeeded = time.monotonic()
        pause = seconds
        while not self._closing.wait(pause):
            start = time.monotonic()
            try:
                function()
                succeeded = time.monotonic()
                # A slow connection is not kept busy with files that grow.
                pause = max(seconds, min(_PAUSES * (succeeded - start), LONGEST_PAUSE_SECONDS))
            except LockLost:
                self._has_failed = True
                raise
            except Exception as error:  # noqa: BLE001 - packages for object storage raise many classes.
                what = reason(error.__cause__ or error, self._copy.url)
                logger.warning("%s could not be brought up to date (%s); trying again.", self._copy.url, what)
                if time.monotonic() > succeeded + GIVE_UP_SECONDS:
                    self._has_failed = True
                    raise OSError(
                        f"{self._copy.url} could not be brought up to date for {GIVE_UP_SECONDS:g} s ({what})"
                    ) from error
