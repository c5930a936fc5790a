"""Worker processes that run a verifier, each answer within a time limit, while the devices go on.

A symbolic comparison can hang inside C code, use up the memory or crash the interpreter, and a thread cannot be stopped. So every
worker is a process of its own, with a thread of this process that waits for it, and kills and replaces it after the time limit.
A worker that dies takes nothing with it but the answer that it was verifying.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import importlib.util
import logging
import multiprocessing
import os
import queue
import resource
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, Self

from rpt_jax.errors import UserError
from rpt_jax.infra.signals import end_with_parent
from rpt_jax.questions.question import Question
from rpt_jax.registry import VERIFIERS, Choice

logger = logging.getLogger(__name__)

DONE, TIMED_OUT, CRASHED = "done", "timed_out", "crashed"
_WORKER_BYTES = 4 * 2**30  # Memory that a worker may use for its answers, in addition to its libraries.
_ATTEMPTS = 2  # A worker may also die because the machine is out of memory, for which its answer is not to blame.
_START_SECONDS = 300.0
_READY = "ready"


class Verdict(NamedTuple):
    """What became of the verification of an answer.

    Attributes:
      score: the verifier's, 1 for a correct answer; 0 unless `outcome` is `DONE`.
      outcome: `DONE`; `TIMED_OUT` after the time limit; `CRASHED` if the verifier raised an exception or ended its process.
      seconds: seconds that the verification took.
    """

    score: float
    outcome: str
    seconds: float


class _Job(NamedTuple):
    answer: str
    question: Question
    verdict: concurrent.futures.Future[Verdict]


class VerifierPool:
    """Runs a verifier in worker processes. A context manager, which ends them."""

    def __init__(self, verifier: str, workers: int = 0, seconds: float = 10.0):
        """
        Args:
          verifier: name of the verifier.
          workers: number of processes; 0 = one for each core.
          seconds: time limit of an answer.

        Raises: UserError, if a package is missing that the verifier needs.
        """
        choice = VERIFIERS[verifier]
        for module in choice.requirements.imports:
            if importlib.util.find_spec(module) is None:
                package = module.replace("_", "-")
                raise UserError(
                    f"questions.verifier='{verifier}' needs the package {package}: pip install {package}.",
                    field="questions.verifier",
                )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        unreported = threading.Lock()
        self._workers = [_Worker(choice, seconds, self._jobs, unreported) for _ in range(workers or cores)]
        for worker in self._workers:
            worker.start()

    def submit(self, answers: Iterable[tuple[str, Question]]) -> list[concurrent.futures.Future[Verdict]]:
        """Start to verify answers, each with its question, and return at once.

        Returns: the verdicts, in order. Equal answers to a question are verified once and have the same verdict object.
        """
        verdicts: dict[tuple[str, str], concurrent.futures.Future[Verdict]] = {}
        result = []
        for answer, question in answers:
            key = (question.id, answer)
            if key not in verdicts:
                verdicts[key] = concurrent.futures.Future()
                self._jobs.put(_Job(answer, question, verdicts[key]))
            result.append(verdicts[key])
        return result

    def close(self) -> None:
        """End the worker processes. Verdicts that are still to come are canceled."""
        with contextlib.suppress(queue.Empty):
            while job := self._jobs.get_nowait():
                job.verdict.cancel()
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker(threading.Thread):
    """Takes jobs from a queue and has them done by a process, which it replaces when it dies."""

    def __init__(
        self,
        verifier: Choice[Any],
        seconds: float,
        jobs: queue.SimpleQueue[_Job | None],
        unreported: threading.Lock,
    ):
        """
        Args:
          verifier: the registered verifier.
          seconds: time limit of a job.
          jobs: shared with the other workers; None ends one of them.
          unreported: shared too; is locked by the first who reports an exception of the verifier.
        """
        super().__init__(name="verifier", daemon=True)
        self._verifier = verifier
        self._seconds = seconds
        self._jobs = jobs
        self._unreported = unreported
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._ending = False

    def run(self) -> None:
        try:
            # Start the process before there is a job: importing libraries takes longer than most jobs.
            with contextlib.suppress(OSError, UserError):
                self._start_process()
            while job := self._jobs.get():
                try:
                    verdict = self._verify(job)
                except Exception as error:  # noqa: BLE001 - raised again where the verdict is read.
                    job.verdict.set_exception(error)
                    continue
                if self._ending:
                    job.verdict.cancel()
                else:
                    job.verdict.set_result(verdict)
        finally:
            self._kill_process()

    def end(self) -> None:
        """End the process and then, from another thread than this one, this thread."""
        self._ending = True
        if process := self._process:
            process.kill()

    def _verify(self, job: _Job) -> Verdict:
        """Return the verdict of a job. Raises: UserError, if no process can be started."""
        seconds = 0.0
        for _ in range(_ATTEMPTS):
            if self._ending:
                break
            connection = self._connection or self._start_process()
            start = time.monotonic()
            try:
                connection.send((job.answer, job.question))
                result = connection.recv() if connection.poll(self._seconds) else None
            except (EOFError, OSError):
                self._kill_process()
                seconds += time.monotonic() - start
                continue
            seconds += time.monotonic() - start
            if isinstance(result, float):
                return Verdict(score=result, outcome=DONE, seconds=seconds)
            if result is None:
                self._kill_process()
                return Verdict(score=0.0, outcome=TIMED_OUT, seconds=seconds)
            if self._unreported.acquire(blocking=False):
                name = job.question.place or job.question.id
                logger.warning("questions.verifier failed on an answer to %s: %s. More are only counted.", name, result)
            break
        return Verdict(score=0.0, outcome=CRASHED, seconds=seconds)

    def _start_process(self) -> Connection:
        """Start a process, wait until it is ready and return the connection to it. Raises: UserError, if it ends before."""
        context = multiprocessing.get_context("spawn")  # Forking a process in which JAX runs threads may deadlock.
        connection: Any
        connection, connection_of_process = context.Pipe()
        imports = self._verifier.requirements.imports
        process = context.Process(
            target=_serve,
            args=(connection_of_process, self._verifier.function, imports, self._seconds),
            name="verifier",
            daemon=True,
        )
        process.start()
        connection_of_process.close()
        self._process = process
        self._connection = connection
        try:
            status = connection.recv() if connection.poll(_START_SECONDS) else "it takes too long"
        except (EOFError, OSError):
            status = "it ends at once"
        if status != _READY:
            self._kill_process()
            raise UserError(
                f"questions.verifier='{self._verifier.name}': a worker process does not start: {status}.",
                field="questions.verifier",
            )
        return connection

    def _kill_process(self) -> None:
        process = self._process
        connection = self._connection
        self._process = None
        self._connection = None
        if process:
            process.kill()
            process.join()
        if connection:
            connection.close()


def _serve(connection: Connection, verifier: Any, imports: Sequence[str], seconds: float) -> None:
    """Verify the answers that arrive, until the connection is closed. The main function of a worker process."""
    end_with_parent()
    try:
        for module in imports:
            importlib.import_module(module)
    except ImportError as error:
        connection.send(str(error))
        return
    _limit_memory()
    connection.send(_READY)
    while True:
        try:
            answer, question = connection.recv()
        except EOFError:
            return
        # If the parent dies while C code runs, no Python code of this process can end it, but the system can.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 10)
        try:
            result: float | str = float(verifier(answer, question))
        except Exception as error:  # noqa: BLE001 - a verifier may raise anything, such as a MemoryError.
            result = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(result)


def _limit_memory() -> None:
    """Let this process use `_WORKER_BYTES` more than it does now, where the system can limit that."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + _WORKER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
