"""Locks that processes with different parts of a study hold while they run or write something."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_SECONDS = 1.0


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the lock of a file inside the block.

    The lock belongs to the open file: a child process that inherits its descriptor holds it until it ends too.

    Args:
      path: the file; it is created if it is missing, and stays.
      waiting: called about once a second while another process has the lock; may raise to give up.

    Yields: the descriptor of the open file.
    """
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(_POLL_SECONDS)
        yield file.fileno()
