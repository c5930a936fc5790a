"""What SIGTERM and SIGINT do: the first saves what can be saved and ends the process, the second ends it at once.

A compilation or a rollout holds the main thread inside XLA for minutes, where Python handles no signal. So a thread of its own
waits for signals, and saves the last state that was whole while the main thread is still at what it was doing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

RESTART = 75  # EX_TEMPFAIL: the same command goes on from where this one stopped.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAVED, _FAILED = 0, 255  # No signals have these numbers.

_changing = threading.RLock()
_save: Callable[[], str] | None = None
_together = False
_asked = threading.Event()
_before_end: Callable[[int, str], None] | None = None


def save_on_stop(save: Callable[[], str] | None, together: bool = False) -> None:
    """Name what a signal runs, in another thread, before the process ends; it returns a few words on what was saved.

    With `together`, which is for several processes that can only save at once, a signal runs nothing: the main thread is to
    look at `was_asked` in every step, and to end with `end_stopped`.
    """
    global _save, _together
    with _changing:
        _save, _together = save, together


def was_asked() -> bool:
    """Whether this process has had a signal."""
    return _asked.is_set()


def end_stopped(saved: str) -> None:
    """End the process, which has saved what `saved` says, with `RESTART`."""
    _end(RESTART, f"Stopped: {saved}. The same command goes on.")


def before_end(tell: Callable[[int, str], None] | None) -> None:
    """Name what is told the exit code and why before a signal ends this process."""
    global _before_end
    _before_end = tell


def end_with_parent() -> None:
    """Make this process, one of several that another one started, end with that one, however it ends.

    It may end by `os._exit` or SIGKILL, of which its children hear nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # A terminal sends it to all; the parent says what it means.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Let what a signal saves wait: inside, the state is neither the old nor the new one."""
    with _changing:
        yield


@contextlib.contextmanager
def stops_on_signals(grace: float) -> Iterator[None]:
    """Inside, a first SIGTERM or SIGINT ends the process with `RESTART` within `grace` seconds, a second one at once.

    What is not saved by then is lost, and the checkpoint before it stands. The exit code of a second signal is 128 + its
    number. A thread that could not write ends the process too, with 2: whoever waits for it would wait for ever. To be
    entered in the main thread.
    """
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    # The one thing that happens in the moment of a signal, whatever the main thread is at.
    earlier = signal.set_wakeup_fd(outgoing, warn_on_full_buffer=False)
    stopping = threading.Event()
    earlier_hook, threading.excepthook = threading.excepthook, _end_unwritten
    watcher = threading.Thread(target=_watch, args=(incoming, outgoing, grace, stopping), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        if stopping.is_set():
            watcher.join()  # It ends the process, and with its own exit code.
        threading.excepthook = earlier_hook
        signal.set_wakeup_fd(earlier)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(outgoing)
        watcher.join()


def _watch(incoming: int, outgoing: int, grace: float, stopping: threading.Event) -> None:
    """Wait for a signal and end the process; return where the pipe is closed, because nothing is left to stop."""
    number = _read(incoming, _SIGNALS)
    if number is None:
        os.close(incoming)
        return
    stopping.set()
    _asked.set()
    where = ", with the other processes after this step," if _together else ""
    _say(f"{signal.Signals(number).name}: stopping{where} within {grace:g} s; another one stops at once.")
    if not _together:
        threading.Thread(target=_run_save, args=(outgoing,), daemon=True).start()
    end = time.monotonic() + grace
    while select.select([incoming], [], [], max(0.0, end - time.monotonic()))[0]:
        number = _read(incoming, (*_SIGNALS, _SAVED, _FAILED))
        if number in _SIGNALS:
            _end(128 + number, "Stopped at once. The same command goes on from the last checkpoint.")
        _end(RESTART if number == _SAVED else 2, "")
    _end(RESTART, f"Nothing more was saved within checkpoint.grace_seconds={grace:g}: the last checkpoint stands.")


def _read(incoming: int, wanted: tuple[int, ...]) -> int | None:
    """The next of the `wanted` bytes; a handler of somebody else's signal writes others. None at the end."""
    while byte := os.read(incoming, 1):
        if byte[0] in wanted:
            return byte[0]
    return None


def _run_save(outgoing: int) -> None:
    result = _FAILED
    try:
        with _changing:
            _say(f"Stopped: {_save() if _save else 'nothing had begun that must be saved'}. The same command goes on.")
            result = _SAVED
            os.write(outgoing, bytes([result]))
            threading.Event().wait()  # Keeps the main thread from changing what was saved, until the process ends.
    except Exception as error:  # noqa: BLE001 - whatever goes wrong, the process must end and say so.
        reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        _say(f"error: the last state could not be saved ({reason}); the checkpoint before it stands.")
        os.write(outgoing, bytes([result]))


def _end_unwritten(thread: threading.ExceptHookArgs) -> None:
    if not isinstance(thread.exc_value, OSError):
        return threading.__excepthook__(thread)
    _end(2, f"error: {thread.exc_value}. Mend it and run the same command again: it goes on from the last checkpoint.")


def _end(code: int, text: str) -> None:
    if text:
        _say(text)
    if _before_end:
        _before_end(code, text or "it was asked to stop before anything had begun that all save")
    sys.stdout.flush()
    os._exit(code)  # The main thread may be inside XLA for minutes to come.


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
