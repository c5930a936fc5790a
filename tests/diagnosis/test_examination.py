"""Which runs can be examined, and the command."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rpt_jax import doctor
from rpt_jax.diagnosis.examination import examine, log_verdict
from rpt_jax.errors import UserError
from tests.helpers.diagnosis import write_run


def test_the_worst_finding_comes_first(tmp_path: Path) -> None:
    sick = {"ended/length": 0.2, "policy/entropy": 6.0, "data/cut": 0.3}
    severities = [finding.severity for finding in examine(write_run(tmp_path, metrics=sick)).findings]
    assert len(severities) == 3 and severities == sorted(severities, reverse=True)


def test_a_rule_without_its_metric_is_named(tmp_path: Path) -> None:
    diagnosis = examine(write_run(tmp_path, without=("mismatch/mean",)))
    assert "metrics.jsonl has no mismatch/mean" in dict(diagnosis.not_checked)["mismatch"]
    assert "mismatch" not in diagnosis.checked


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "data/pas')
    assert examine(run).step == 60


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("metrics.jsonl", None, "metrics.jsonl"),
        ("metrics.jsonl", "", "metrics.jsonl"),
        ("metrics.jsonl", '{"step": 0}\n', "metrics.jsonl"),
        ("metrics.jsonl", "{}\n{}\n", "metrics.jsonl"),
        ("run_config.json", None, "--workdir"),
        ("run_config.json", "[]", "--workdir"),
        ("run_config.json", '{"format": 3, "version": "0.1.0"}', "--workdir"),
    ],
)
def test_a_run_that_cannot_be_examined_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None, field: str
) -> None:
    path = write_run(tmp_path) / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refused:
        examine(tmp_path)
    assert refused.value.field.endswith(field)
    assert doctor.main(["doctor", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_task_that_does_not_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        examine(write_run(tmp_path, config={"task": "score"}))
    assert refused.value.field == "--workdir"


def test_the_command_describes_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    well, sick = write_run(tmp_path / "well"), write_run(tmp_path / "sick", metrics={"data/cut": 0.5})
    assert doctor.main(["doctor", f"--workdir={well}", f"--workdir={sick}"]) == 0
    printed = capsys.readouterr().out
    assert "no problems found" in printed.partition(str(sick))[0]
    assert "raise prompt.max_tokens (now 256)" in printed.partition(str(sick))[2]


def test_json_holds_the_findings_of_the_runs_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sick = write_run(tmp_path / "sick", metrics={"data/cut": 0.5})
    assert doctor.main(["doctor", "--json", f"--workdir={tmp_path / 'absent'}", f"--workdir={sick}"]) == 2
    [run] = json.loads(capsys.readouterr().out)
    [finding] = run["findings"]
    assert finding["rule"] == "prompts_cut" and finding["severity"] == "warning"
    assert finding["evidence"] == [{"metric": "data/cut", "value": 0.5, "first_step": 51, "last_step": 60}]
    assert finding["changes"][0] == {"field": "prompt.max_tokens", "action": "raise", "now": 256, "to": None}
    assert run["not_checked"]["loss_rose"]


def test_chosen_rules_are_checked_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sick = write_run(tmp_path, metrics={"data/cut": 0.5, "ended/length": 0.5})
    assert doctor.main(["doctor", "--json", "--rule=prompts_cut", f"--workdir={sick}"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["checked"] == ["prompts_cut"]
    with pytest.raises(UserError) as refused:
        examine(sick, ["prompt_cut"])
    assert refused.value.field == "--rule"


@pytest.mark.parametrize(("cut", "level"), [(0.0, logging.INFO), (0.5, logging.WARNING)])
def test_the_end_of_a_run_has_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: float, level: int
) -> None:
    run = write_run(tmp_path, metrics={"data/cut": cut})
    with caplog.at_level(logging.INFO, logger="rpt_jax"):
        log_verdict(run)
    [record] = caplog.records
    assert record.levelno == level and f"--workdir={run}" in record.getMessage()


def test_a_run_that_cannot_be_examined_does_not_end_with_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_verdict(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
