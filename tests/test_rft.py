"""Small runs of tasks "rft" and "difficulty": what they leave, how they resume, and that the tasks share the loop."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import configs.rft_tiny
from rpt_jax import main
from rpt_jax.config import from_config_dict
from rpt_jax.diagnosis.rule import RULES
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_policy
from tests.helpers.paths import ROOT
from tests.helpers.questions import SMALL_RFT
from tests.helpers.runs import experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment("rft_tiny", **SMALL_RFT), workdir)
    return workdir


def test_a_run_leaves_metrics_result_plots_and_policy(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("eval/questions/accuracy" in lines[i] for i in (0, 2, 3)) and "eval/questions/accuracy" not in lines[1]
    for line in lines[1:]:
        assert line["reward/mean"] == pytest.approx(line["status/correct"]) and line["mismatch/max"] < 1e-4
        statuses = [value for name, value in line.items() if name.startswith("status/")]
        assert sum(statuses) == pytest.approx(1) and "status/inside_token" not in line
        assert line["verification/timed_out"] == line["verification/crashed"] == 0 <= line["time/verification"]
    result = json.loads((finished / "result.json").read_text())
    assert result["rejected_questions"] == {}
    for when in ("before", "after"):
        evaluation = result[when]
        average = evaluation["accuracy"]["micro"]
        assert average["low"] <= average["mean"] <= average["high"]
        assert evaluation["pass"]["1"]["mean"] == pytest.approx(average["mean"])
        assert list(evaluation["pass"]) == ["1", "2", "4"] and evaluation["questions"] == 8
    assert len(list((finished / "plots").glob("*.png"))) == 3
    _, _, fingerprint = load_policy(finished / "policy")
    assert fingerprint == load_tokenizer(finished / "policy").fingerprint


def test_the_page_of_metrics_explains_every_key_and_the_doctor_reads_them(finished: Path) -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    [section] = re.findall(r"^## .*\{#rft\}$(.*?)^## ", page, flags=re.MULTILINE | re.DOTALL)
    own = set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE))
    everywhere = set(re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE))
    written = set().union(*read_metrics(finished / "metrics.jsonl"))
    assert own <= written <= everywhere
    read = {
        metric for rule in RULES.choices() if "rft" in rule.requirements.tasks for metric in rule.requirements.metrics
    }
    assert read <= written


def test_other_questions_are_refused_when_a_run_resumes(tmp_path: Path, finished: Path) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    changes = {"questions.source_options.documents": 70, "training.total_steps": 4}
    with pytest.raises(UserError) as raised:
        main.run(experiment("rft_tiny", **SMALL_RFT | changes), workdir, force=True)
    assert raised.value.field == "questions.source"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective.reward", "info_gain"),
        ("objective.reward", "first_token"),
        ("objective.document_weight", 0.1),
        ("cold_start.total_steps", 5),
        ("prompt.box_reading", "to_end"),
    ],
)
def test_what_a_run_on_questions_cannot_do_is_refused(field: str, value: object) -> None:
    """On the command line and in a config file."""
    config = configs.rft_tiny.get_config().to_dict()
    section, _, name = field.partition(".")
    config[section][name] = value
    for task in ("rft", "difficulty"):
        with pytest.raises(UserError, match=f"has no effect with task='{task}'") as raised:
            from_config_dict(config | {"task": task})
        assert raised.value.field == field


@pytest.mark.parametrize(
    "field", ["data.entropy_threshold", "data.source_options.documents", "pretrain.row_tokens", "evaluation.positions"]
)
def test_fields_of_text_are_refused_on_the_command_line(field: str) -> None:
    with pytest.raises(UserError) as raised:
        experiment("rft_tiny", **{field: 5})
    assert raised.value.field == field


def test_fields_of_questions_are_refused_in_other_tasks() -> None:
    with pytest.raises(UserError, match="has no effect with task='rpt'") as raised:
        experiment("rpt_tiny", **{"questions.verifier": "boxed_exact"})
    assert raised.value.field == "questions.verifier"
