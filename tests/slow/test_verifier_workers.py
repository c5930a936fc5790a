"""Worker processes of verifiers do not outlive the process that started them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

pytestmark = pytest.mark.slow

# Prints the ids of two workers, of which the first one then hangs inside of C code.
PROGRAM = """
import multiprocessing, time
from rpt_jax.questions.question import Question
from rpt_jax.rewards import verifier_pool
from tests.helpers import hostile_verifier

verifier_pool.VERIFIERS = hostile_verifier.VERIFIERS
pool = verifier_pool.VerifierPool("hostile", workers=2, seconds=1.0)
question = Question(id="q", text="?", answers=("right",))
[verdict.result() for verdict in pool.submit((f"right {n}", question) for n in range(50))]
pids = [child.pid for child in multiprocessing.active_children()]
pool.submit([("hang", question)])
time.sleep(0.2)
print(*pids, flush=True)
time.sleep(1000)
"""


def test_workers_end_after_their_parent_was_killed():
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert program.stdout
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2
    program.kill()
    program.wait()
    give_up = time.monotonic() + CHILD_SECONDS
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < give_up
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended may stay in the table of processes until its parent reads its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
