"""Small studies: one of real runs, and one whose commands are a script that leaves the result of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rpt_jax.config.study import ArmConfig, StageConfig, StudyConfig, SuiteConfig
from rpt_jax.study.outcome import Unit
from rpt_jax.study.plan import Run, UnitPlan
from tests.helpers.questions import SMALL_RFT
from tests.helpers.runs import SMALL

BUDGET = 1.2e11  # FLOPs, a few steps.


def assignments(fields: dict[str, object]) -> tuple[str, ...]:
    """Return overrides of a stage."""
    return tuple(f"{field}={value}" for field, value in fields.items())


def small_study() -> StudyConfig:
    """Return a study of real runs of a few steps: the base, RPT, and sampled traces that are learned."""
    read_by = ("data.", "prompt.", "rollout.", "training.prompts_per_step")
    traces = {field: value for field, value in SMALL.items() if field.startswith(read_by)}
    until_spent = {"training.total_steps": 1000, "optimizer.schedule": "constant", "checkpoint.every_steps": 1}
    documents = {
        field: value for field, value in SMALL.items() if field.startswith("data.") and "positions" not in field
    }
    evaluated = {
        **{field: value for field, value in SMALL.items() if field.startswith(("data.", "prompt.", "rollout."))},
        "evaluation.positions": 16,
        "training.prompts_per_step": 8,
    }
    return StudyConfig(
        question="Does it run?",
        arms=(
            ArmConfig(name="base"),
            ArmConfig(
                name="rpt",
                description="RPT.",
                stages=(
                    StageConfig(
                        name="rpt",
                        config="configs/rpt_tiny.py",
                        overrides=assignments(SMALL | until_spent | {"evaluation.every_steps": 1000}),
                    ),
                ),
            ),
            ArmConfig(
                name="sft",
                stages=(
                    StageConfig(
                        name="traces",
                        config="configs/traces_tiny.py",
                        overrides=assignments(traces | {"traces.total_prompts": 16, "data.entropy_threshold": 0.1}),
                    ),
                    StageConfig(
                        name="sft",
                        config="configs/sft_tiny.py",
                        overrides=(
                            "pretrain.trace_options.path={traces}",
                            *assignments(documents | until_spent | {"pretrain.windows_per_step": 4}),
                        ),
                    ),
                ),
            ),
        ),
        references=("base",),
        seeds=(0,),
        budgets=(BUDGET,),
        tuning=StageConfig(
            name="tuning", config="configs/rft_tiny.py", overrides=assignments(SMALL_RFT | {"training.total_steps": 2})
        ),
        evaluations=(SuiteConfig(suite="next_token", config="configs/rpt_tiny.py", overrides=assignments(evaluated)),),
    )


# --- runs that are a script ---------------------------------------------------------------------------

# Leaves a result, after it has appended a line to `calls.txt` in the directory of the study. Arguments: the FLOPs that it spends,
# the seconds that it takes, the exit code, and those that a study adds.
_SCRIPT = """
import json, os, signal, sys, time
flops, seconds, code, *rest = sys.argv[1:]
workdir = next(a for a in rest if a.startswith("--workdir=")).partition("=")[2]
calls = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(workdir))), "calls.txt")

def note(text):
    with open(calls, "a") as file:
        file.write(text + chr(10))

def save_and_end(*_):
    note("saved")
    os._exit(75)

signal.signal(signal.SIGUSR1, save_and_end)
note(" ".join([os.path.basename(workdir), *(a for a in rest if a.startswith("--config."))]))
time.sleep(float(seconds))
print("one line", flush=True)
if int(code):
    sys.exit(int(code))
os.makedirs(workdir, exist_ok=True)
with open(os.path.join(workdir, "result.json"), "w") as file:
    average = {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 8}
    evaluation = {"accuracy": {"micro": average, "categories": {"all": average}}}
    json.dump({**json.loads(os.environ["STAMP"]), "flops": float(flops), "seconds": 1.0, "steps": 1, "devices": 1,
               "device_kind": "cpu", "before": evaluation, "after": evaluation}, file)
with open(os.path.join(workdir, "metrics.jsonl"), "w") as file:
    file.write(json.dumps({"step": 0}) + chr(10))
"""


def script_run(unit: Path, name: str, *, flops: float = 1.0, seconds: float = 0.0, code: int = 0, **fields: Any) -> Run:
    """Return a run of a unit whose command is a script.

    Args:
      unit: directory of the unit, such as STUDY/ARM/seed0.
      name: of the run.
      flops, seconds, code: what it spends, how long it takes and its exit code.
      fields: other fields of the run.
    """
    command = (sys.executable, "-c", _SCRIPT, str(flops), str(seconds), str(code))
    return Run(name=name, directory=unit / name, command=command, result="result.json", **fields)


def script_unit(
    study: Path, arm: str, *stages: Run, budget: float | None = None, tuning: Run | None = None
) -> UnitPlan:
    """Return a unit of such runs; by default, its fine-tuning is one too."""
    directory = study / arm / "seed0"
    return UnitPlan(
        unit=Unit(arm, 0, budget),
        directory=directory,
        stages=stages,
        evaluations={},
        tuning=tuning or script_run(directory, "tuning"),
    )


def calls(study: Path) -> list[str]:
    """Return what the scripts of a study have noted."""
    path = study / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []
