"""Stop signals: the first one saves the run and exits, a second SIGTERM or SIGINT exits at once.

Schedulers send SIGUSR1 or SIGUSR2 before a time limit, and a closed terminal sends SIGHUP. These only ask to save: a SIGTERM that
follows one of them, as it does at the time limit itself, does not cut the saving short.

A compilation or a rollout keeps the main thread inside XLA for minutes, and Python runs signal handlers only on the main thread.
So a background thread waits for signals and saves the last complete state while the main thread is still busy.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from rpt_jax.errors import ExitCode
from rpt_jax.infra.storage import with_urls

_URGENT = (signal.SIGTERM, signal.SIGINT)  # A second one of these exits at once.
_SIGNALS = (*_URGENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LAST_SECONDS = 3.0  # That `on_exit` has where the process should exit at once, to tell other processes.
# What a disk says that cannot be written to, whose thread it is in: such a run cannot go on.
_DISK_ERRORS = (errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE)


class StopSignals:
    """What SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 do to a run.

    Nothing is handled before `handle` is entered; the other methods work without it too.

    Args:
      grace_seconds: seconds that saving may take after the first signal.

    Attributes:
      on_exit: called with the exit code and the reason before a signal ends the process, for example to tell other processes. It
        runs on any thread, and has no longer than the grace period; a second signal does not wait for it.
    """

    def __init__(self, grace_seconds: float = 60.0):
        self._grace_seconds = grace_seconds
        self._changing = threading.RLock()  # Held while the state of the run is neither the old nor the new one.
        self._save: Callable[[], str] | None = None
        self._kept: Callable[[], str] | None = None
        self._at_step_end = False
        self._is_saved = False
        self._requested = threading.Event()
        self.on_exit: Callable[[int, str], None] | None = None

    def set_save(self, save: Callable[[], str] | None, at_step_end: bool = False) -> None:
        """Register the callback that saves the run when a signal arrives.

        Args:
          save: runs on a background thread; returns a few words on what was saved. None to save nothing.
          at_step_end: do not call `save` on the background thread. Several processes can only save together, so the loop checks
            `requested` after each step, saves and calls `exit_stopped`.
        """
        with self._changing:
            self._save = save
            self._at_step_end = at_step_end
            self._kept = None

    def set_kept(self, kept: Callable[[], str]) -> None:
        """Register what says in a few words which results are on disk, for work that has nothing to save at a signal."""
        self._kept = kept

    @property
    def requested(self) -> bool:
        """Whether a stop signal has arrived."""
        return self._requested.is_set()

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Make a signal wait with saving until the block ends, because the state is inconsistent inside."""
        with self._changing:
            yield

    def exit_stopped(self, saved: str) -> None:
        """Exit with `ExitCode.RESTART`; `saved` says in a few words what was saved."""
        self._is_saved = True
        self._exit(ExitCode.RESTART, _stopped(saved))

    @contextlib.contextmanager
    def handle(self) -> Iterator[None]:
        """Handle stop signals inside the block. Must be entered on the main thread.

        The first signal saves the run and exits with `ExitCode.RESTART` within the grace period; what is not saved by then is
        lost, and the latest checkpoint remains. A second SIGTERM or SIGINT exits at once with 128 + its number. A signal
        that is ignored stays ignored, such as SIGHUP under nohup and SIGINT in the background of a shell script.

        An OSError in a thread of this package, or of a disk that cannot be written to in any thread, exits with
        `ExitCode.USER_ERROR`: the run would otherwise wait forever for a thread that cannot write. A connection that another
        library's thread has lost is reported and left to that library.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        earlier_handlers = {number: signal.signal(number, lambda *_: None) for number in handled}
        # Python writes the number of a signal into this pipe immediately, even while the main thread is inside XLA.
        earlier_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        earlier_hook = threading.excepthook
        threading.excepthook = self._on_thread_exception
        stopping = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(read_end, stopping), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            if stopping.is_set():
                watcher.join()  # Exits the process with its own exit code.
            threading.excepthook = earlier_hook
            signal.set_wakeup_fd(earlier_wakeup)
            for number, handler in earlier_handlers.items():
                signal.signal(number, handler)
            os.close(write_end)
            watcher.join()

    def _watch(self, read_end: int, stopping: threading.Event) -> None:
        """Wait for a signal and exit the process; return when the pipe is closed because the block has ended."""
        number = _read_signal(read_end)
        if number is None:
            os.close(read_end)
            return
        stopping.set()
        self._requested.set()
        deadline = time.monotonic() + self._grace_seconds
        is_urgent = number in _URGENT

        # Save and exit on other threads, so that a second signal and the deadline are noticed meanwhile.
        if self._kept:
            self._is_saved = True
            message = f"{signal.Signals(number).name}: {_stopped(self._kept())}"
            threading.Thread(target=self._exit, args=(ExitCode.RESTART, message), daemon=True).start()
        else:
            when = "after this step, together with the other processes, " if self._at_step_end else ""
            second = "; a second signal stops at once" if is_urgent else ""
            _print(f"{signal.Signals(number).name}: stopping {when}within {self._grace_seconds:g} s{second}.")
            if not self._at_step_end:
                threading.Thread(target=self._save_and_exit, daemon=True).start()

        while select.select([read_end], [], [], max(0.0, deadline - time.monotonic()))[0]:
            number = os.read(read_end, 1)[0]
            if number in _URGENT and is_urgent:
                self._exit_at_once(
                    128 + number, "Stopped at once. Rerun the same command to resume from the latest checkpoint."
                )
            is_urgent = is_urgent or number in _URGENT
        limit = f"within checkpoint.grace_seconds={self._grace_seconds:g}"
        self._exit_at_once(
            ExitCode.RESTART,
            f"The upload did not end {limit}; what was uploaded before remains."
            if self._is_saved
            else f"Nothing was saved {limit}; the latest checkpoint remains.",
        )

    def _save_and_exit(self) -> None:
        try:
            with self._changing:
                saved = self._save() if self._save else "nothing needed to be saved yet"
                self._is_saved = True
                _print(_stopped(saved))
                # Keep the lock until the process exits, so that the main thread does not change what was saved.
                self._exit(ExitCode.RESTART, "")
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the process must exit and say so.
            reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
            _print(f"error: the current state could not be saved ({reason}); the latest checkpoint remains.")
            self._exit(ExitCode.USER_ERROR, "")

    def _on_thread_exception(self, thread: threading.ExceptHookArgs) -> None:
        error = thread.exc_value
        if not isinstance(error, OSError) or not (error.errno in _DISK_ERRORS or _is_own(thread)):
            threading.__excepthook__(thread)
            return
        self._exit(
            ExitCode.USER_ERROR,
            f"error: {error}. Fix this and rerun the same command to resume from the latest checkpoint.",
        )

    def _exit_at_once(self, code: int, message: str) -> NoReturn:
        """Exit like `_exit`, but hardly wait for `on_exit`, which may be uploading or not return at all."""
        exiting = threading.Thread(target=self._exit, args=(code, message), daemon=True)
        exiting.start()
        exiting.join(_LAST_SECONDS)
        os._exit(code)

    def _exit(self, code: int, message: str) -> None:
        if message:
            _print(message)
        if self.on_exit:
            self.on_exit(code, message or "it received a stop signal before there was anything to save")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # The main thread may stay inside XLA for minutes.


def end_with_parent() -> None:
    """Exit this worker process when its parent exits, however that happens, and ignore stop signals except SIGTERM.

    A parent that ends by `os._exit` or SIGKILL does not tell its children.
    """
    # Terminals and Slurm send their signals to all processes; the parent decides what to do. It ends a worker by SIGTERM.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent must be called in a process that multiprocessing started")

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def _read_signal(read_end: int) -> int | None:
    """Return the next of `_SIGNALS`; None when the pipe is closed. Other signals write their numbers as well."""
    while byte := os.read(read_end, 1):
        if byte[0] in _SIGNALS:
            return byte[0]
    return None


def _is_own(thread: threading.ExceptHookArgs) -> bool:
    """Return whether the function that a thread has run is one of this package."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(thread.exc_traceback))
    outermost = next((module for module in modules if module != "threading"), "")
    return outermost.startswith(f"{__name__.partition('.')[0]}.")


def _stopped(saved: str) -> str:
    return f"Stopped: {saved}. Rerun the same command to resume."


def _print(text: str) -> None:
    # Printed and not logged: the main thread may hold the lock of a logging handler. A closed terminal cannot be written to.
    with contextlib.suppress(OSError):
        print(with_urls(text), file=sys.stderr, flush=True)
