"""A config field that nothing reads would be a promise that no run keeps."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpt_jax import evaluate, main
from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.config.dataclass_io import leaves
from tests.helpers.evaluation import question_flags
from tests.helpers.paths import ROOT, TINY

# Reads by these modules do not count: they look at every field.
GENERIC = (
    "rpt_jax.config.schema",
    "rpt_jax.config.validation",
    "rpt_jax.config.task_fields",
    "rpt_jax.config.loading",
    "rpt_jax.config.dataclass_io",
    "dataclasses",
    "copy",
)
OPTIONS = ("data.source_options.", "data.target_options.", "questions.source_options.", "pretrain.trace_options.")
SMALL = {
    "policy.path": str(TINY),
    "data.held_out_documents": 20,
    "data.max_document_tokens": 128,
    "prompt.max_tokens": 128,
    "rollout.samples_per_prompt": 4,
    "rollout.max_new_tokens": 16,
    "training.prompts_per_step": 8,
    "training.total_steps": 2,
    "training.microbatch_tokens": 512,
    "evaluation.positions": 8,
    "evaluation.unseen_positions": 8,
    "divergence.window": 1,
}
REINFORCE = SMALL | {
    "data.positions": "self_entropy",
    "data.rescore_every_steps": 1,
    "data.rescore_windows": 16,
    "data.source_options.documents": 60,
    "data.source_options.held_out_templates": 2,
    "objective.reward": "info_gain",
    "objective.loss": "dual_clip",
    "objective.importance": "mask",
    "objective.kl": "k3",
    "objective.kl_weight": 0.1,
    "objective.entropy_weight": 0.1,
    "objective.document_weight": 0.1,
    "objective.format_weight": 0.1,
    "objective.overlong_weight": 0.1,
    "objective.overlong_tokens": 8,
    "objective.budget_weight": 0.1,
    "objective.budget_start": 8,
    "training.dynamic_sampling_from": 1,
    "cold_start.total_steps": 1,
    "pretrain.traces": "arithmetic",
    "pretrain.windows_per_step": 2,
}


SEGMENTS = {"data.targets": "segment", "data.target_options.unit": "tokens", "data.target_options.tokens": 2}


QUESTIONS = {
    name: value for name, value in SMALL.items() if name.partition(".")[0] != "data" and "positions" not in name
} | {
    "questions.verifier": "boxed_exact",
    "questions.verifier_workers": 1,
    "questions.test_questions": 8,
    "prompt.template": "question",
}


@pytest.mark.slow
def test_every_field_is_read_by_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    read: set[str] = set()
    for prefix, schema in _sections(Experiment):
        monkeypatch.setattr(schema, "__getattribute__", _recorder(schema, prefix, read))
    (tmp_path / "corpus.txt").write_text((ROOT / "docs" / "concepts" / "reward.md").read_text() * 20)
    files = {"data.source": "path", "data.path": str(tmp_path / "corpus.txt")}
    threshold = {"data.positions": "threshold", "data.entropy_threshold": 0.1, "training.total_steps": 1}
    threshold |= {"policy.lora.rank": 2}
    pretrain = {"policy.path": "", "data.source_options.documents": 60, "pretrain.windows_per_step": 2}
    _run(tmp_path / "rpt", **REINFORCE)
    _run(tmp_path / "threshold", **SMALL | files | threshold)
    _run(tmp_path / "segments", **SMALL | files | threshold | SEGMENTS)
    _run(tmp_path / "score", task="score", **SMALL | files)
    _run(tmp_path / "traces", task="traces", **SMALL | {"data.source_options.documents": 60, "traces.total_prompts": 8})
    _run(tmp_path / "pretrain", task="pretrain", **SMALL | pretrain)
    questions = QUESTIONS | {"questions.path": str(tmp_path / "questions.jsonl")}
    records = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    _run(tmp_path / "difficulty", task="difficulty", **questions)
    generated = {"questions.source": "worked_solutions", "questions.source_options.documents": 20}
    _run(tmp_path / "generated", task="difficulty", **QUESTIONS | generated)
    pass_rates = str(tmp_path / "difficulty" / "pass_rates.jsonl")
    _run(tmp_path / "rft", task="rft", **questions, **{"questions.pass_rates": pass_rates, "questions.min_passes": 0})
    _evaluate("next_token", tmp_path / "threshold.py")
    (tmp_path / "letters").mkdir()
    letters = ["--config.prompt.max_tokens=256", "--config.multiple_choice.max_new_tokens=8"]
    _evaluate("multiple_choice", tmp_path / "rft.py", *letters, *question_flags(tmp_path / "letters"))
    every = {name for name, _ in leaves(from_config_dict({}))}
    unread = {name for name in every - read if not name.startswith(OPTIONS)}
    assert not unread


def _sections(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield a dataclass and those of its sections, each after what comes before the names of its fields."""
    yield prefix, schema
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default):
            yield from _sections(type(field.default), f"{prefix}{field.name}.")


def _recorder(schema: type, prefix: str, read: set[str]):
    names = {field.name for field in dataclasses.fields(schema)}

    def getattribute(self: object, name: str) -> object:
        if name in names:
            frame = inspect.currentframe()
            assert frame and frame.f_back
            reader = frame.f_back.f_globals["__name__"]
            if not reader.startswith(GENERIC):
                read.add(f"{prefix}{name}")
        return object.__getattribute__(self, name)

    return getattribute


def _evaluate(suite: str, config: Path, *flags: str) -> None:
    workdir = config.with_name(suite)
    assert evaluate.main(["evaluate", f"--suite={suite}", f"--config={config}", f"--workdir={workdir}", *flags]) == 0


def _run(workdir: Path, task: str = "rpt", **values: object) -> None:
    config = workdir.with_suffix(".py")
    lines = [f"    config.{name} = {value!r}" for name, value in {"task": task, **values}.items()]
    config.write_text(
        "\n".join(
            [
                "from rpt_jax.config import default_config",
                "def get_config():",
                "    config = default_config()",
                *lines,
                "    return config",
                "",
            ]
        )
    )
    assert main.main(["main", f"--config={config}", f"--workdir={workdir}"]) == 0
