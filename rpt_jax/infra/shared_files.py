"""Files that process 0 writes and all processes of a run read."""

from __future__ import annotations

from pathlib import Path

from rpt_jax.distributed.processes import is_leader, wait_for_all
from rpt_jax.infra.storage import RemoteCopy


def share(directory: Path, name: str) -> None:
    """Wait at the barrier `name`, after which every process sees what process 0 has written to a directory.

    On a file system of all processes, this is only the barrier. In the copy of a URL, process 0 uploads what has changed, and
    every process fetches what others have written. A collective: every process must call it.

    Raises: OSError or UserError, if the URL cannot be used.
    """
    copy = RemoteCopy.of(directory)
    if copy and is_leader():
        copy.push()
    wait_for_all(name)
    if copy:
        copy.fetch("--workdir", reset=False)
