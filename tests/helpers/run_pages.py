"""The directory of a made-up run with rollouts, for the page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.infra.rollout_files import EVALUATION, TEXT, RolloutFiles
from rpt_jax.infra.run_format import format_stamp
from rpt_jax.kept_rollouts import rollout_schema, text_schema

# A corpus may hold this.
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
WORDS = " the apple cart has seven wheels and Ümit sells 12 pears for $ 4 each".split(" ")


def write_run(
    workdir: Path, *, steps: int = 6, prompts: int = 2, samples: int = 4, hostile: str = "", finished: bool = True
) -> Path:
    """Write the directory of a run with evaluations at the start, in the middle and at the end, and return it.

    Args:
      workdir: the directory.
      steps: training steps.
      prompts: kept prompts of each step.
      samples: rollouts of each prompt.
      hostile: text that stands in the corpus, the responses, and the config.
      finished: whether it has a result.
    """
    rng = np.random.default_rng(0)
    workdir.mkdir(parents=True, exist_ok=True)
    evaluated = (0, steps // 2, steps)
    lines = [_metrics(step, steps, step in evaluated, rng) for step in range(steps + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {**dict(leaves(Experiment())), "training.total_steps": steps, "data.path": hostile, "seed": 7}
    content = {**format_stamp(), "command": f"python -m rpt_jax.main {hostile}", "config": config}
    (workdir / "run_config.json").write_text(json.dumps(content))
    if finished:
        (workdir / "result.json").write_text(json.dumps({**format_stamp(), "steps": steps, "wall_seconds": 61.0}))
    write_rollouts(workdir, steps, prompts, samples, evaluated, hostile)
    return workdir


def write_rollouts(
    workdir: Path, steps: int, prompts: int, samples: int, evaluated: tuple[int, ...], hostile: str = ""
) -> None:
    """Write the files of `rollouts/`, a file for 50 steps."""
    with RolloutFiles(workdir, -1, 50, evaluations=True) as files:
        for step in range(1, steps + 1):
            table = make_rollouts(step, prompts, samples, split="train", hostile=hostile)
            files.add_training(step, lambda table=table: table)
        for step in evaluated:
            with files.evaluation(step) as keep:
                table = make_rollouts(step, 8, samples, split="held_out", hostile=hostile)
                keep(EVALUATION, lambda table=table: table)
                if step in (evaluated[0], evaluated[-1]):
                    text = make_text(step, hostile)
                    keep(TEXT, lambda text=text: text)


def make_rollouts(step: int, prompts: int, samples: int, *, split: str, hostile: str = "") -> pa.Table:
    """Return rollouts whose first ones are right, more of them in later steps."""
    rows: list[dict[str, Any]] = []
    for p in range(prompts):
        for g in range(samples):
            right = (p + step) % (samples + 1) > g
            rows.append(
                {
                    "step": step,
                    "split": split,
                    "prompt": p,
                    "source": str(p // 4),
                    "window": p // 4,
                    "position": 3 + 2 * (p % 4),
                    "entropy": 0.4 + 0.5 * (p % 4),
                    "context": hostile + " ".join(WORDS),
                    "truth": " 12",
                    "sample": g,
                    "status": "correct" if right else "wrong bytes",
                    "reward": float(right),
                    "length": 9,
                    "logprob": -3.25 - g,
                    "reasoning": f"It sells {g} pears, step {step}. {hostile}",
                    "answer": f"\\boxed{{ {12 if right else g}}}{hostile}",
                    "prediction": " 12" if right else f" {g}{hostile}",
                }
            )
    return pa.Table.from_pylist(rows, schema=rollout_schema())


def make_text(step: int, hostile: str = "") -> pa.Table:
    """Return two windows of text; a letter is divided between two tokens."""
    tokens = [f" {word}".encode() for word in [hostile, *WORDS[1:]]]
    tokens = [part for token in tokens for part in ([token[:2], token[2:]] if b"\xc3\x9cmit" in token else [token])]
    rows = [
        {
            "step": step,
            "split": "held_out",
            "window": window,
            "position": position,
            "entropy": 0.2 * position,
            "direct_correct": position % 3 == 0,
            "token": token,
        }
        for window in range(2)
        for position, token in enumerate(tokens)
    ]
    return pa.Table.from_pylist(rows, schema=text_schema())


def training_files(workdir: Path) -> dict[str, bytes]:
    """Return the content of each file in `rollouts/`."""
    return {path.name: path.read_bytes() for path in sorted((workdir / "rollouts").iterdir())}


def _metrics(step: int, steps: int, is_evaluated: bool, rng: np.random.Generator) -> dict[str, float]:
    line: dict[str, float] = {"step": step, "flops/train_total": 1e12 * step, "time/evaluation": 0.0}
    if step:
        line |= {
            "reward/drawn_mean": 0.3 * step / steps + 0.05 * rng.uniform(),
            "length/mean": 40 - 5 * rng.uniform(),
            "policy/entropy": 1.2 - 0.5 * step / steps + 0.1 * rng.uniform(),
            "format/rate": 0.9,
            "groups/drawn_zero_variance": 0.5 - 0.2 * step / steps,
            "rollout/occupancy": 0.8 + 0.1 * rng.uniform(),
            "speed/mfu": 0.02 + 0.01 * rng.uniform(),
            "speed/tokens_per_second": 900 + 50 * rng.uniform(),
            "time/rollout": 1.0 + rng.uniform(),
            "time/update": 0.5 + rng.uniform(),
        }
    if is_evaluated:
        line["time/evaluation"] = 3.0
        for level, base in (("easy", 0.4), ("medium", 0.3), ("hard", 0.2)):
            accuracy = base + 0.15 * step / steps
            line |= {
                f"eval/reasoning/{level}": accuracy,
                f"eval/reasoning/{level}/low": accuracy - 0.03,
                f"eval/reasoning/{level}/high": accuracy + 0.03,
            }
    return line
