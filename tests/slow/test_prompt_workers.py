"""Worker processes that build prompts, from their start to the end of the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import time

from absl import flags

from rpt_jax.config import PromptConfig
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.pipeline import PromptStream, position_order
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import load_tokenizer

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    tokenizer = load_tokenizer("configs/tiny")
    windows = [tokenizer.encode("seven and five are twelve " * 20)] * 20
    positions = [Position(window, 20, 1.0) for window in range(20)]
    orders = [position_order([positions], [], batch=8, per_window=0, seed=(0,))]
    # Kept until the interpreter ends, as in a run.
    sys.stream = PromptStream(PromptBuilder(PromptConfig(), tokenizer), windows, orders, batch=8, workers=1)
    next(sys.stream)
    sys.stream.switch_orders(orders)
    next(sys.stream)
    time.sleep(1)  # The workers build batches ahead.
    sys.stream.close()
"""


def test_a_closed_stream_leaves_no_shared_memory(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0 and "leaked" not in finished.stderr, finished.stderr
