"""Verifiers that do what their answers say, such as to crash, or cannot be used."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from pathlib import Path

from rpt_jax.questions.question import Question
from rpt_jax.registry import Registry, VerifierRequirements

# Verifiers of tests only: those of `registry.VERIFIERS` are listed in messages.
VERIFIERS = Registry("questions.verifier", (), VerifierRequirements)


@VERIFIERS.register("unusable", imports=("no_such_package",))
def unusable(answer: str, question: Question) -> float:
    return 0.0


@VERIFIERS.register("hostile")
def hostile(answer: str, question: Question) -> float:
    """Do what the answer says, and else accept `right`."""
    action, _, argument = answer.partition(" ")
    if action == "die":
        signal.raise_signal(signal.SIGKILL)
    if action == "segfault":
        ctypes.string_at(0)
    if action == "allocate":
        return float(len(bytearray(2**33)))  # 8 GiB of zeros take no memory unless they are limited.
    if action == "raise":
        raise ValueError("as requested")
    if action == "hang":
        return float(str(9 ** (9**9)) == "")  # In C code, which no signal handler of Python interrupts.
    if action == "die_once" and not Path(argument).exists():
        Path(argument).touch()
        signal.raise_signal(signal.SIGKILL)
    if action == "wait":
        while not Path(argument).exists():
            time.sleep(0.01)
    if action == "imported":
        return float(argument in sys.modules)
    if action == "main_thread":
        return float(threading.current_thread() is threading.main_thread())
    return float(answer == "right" or action in ("die_once", "wait"))
