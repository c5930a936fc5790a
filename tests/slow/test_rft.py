"""Small runs of tasks "rft" and "difficulty" that resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.errors import UserError
from tests.helpers.questions import SMALL_RFT
from tests.helpers.run_pages import training_files
from tests.helpers.runs import comparable, experiment, interruption_after

pytestmark = pytest.mark.slow

READ_BY_DIFFICULTY = ("questions.", "prompt.", "rollout.", "training.prompts_per_step")
DIFFICULTY = {
    "task": "difficulty",
    **{field: value for field, value in SMALL_RFT.items() if field.startswith(READ_BY_DIFFICULTY)},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment("rft_tiny", **SMALL_RFT), workdir)
    return workdir


def test_an_interrupted_run_resumes_to_the_same_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    with interruption_after(2, monkeypatch):
        main.run(experiment("rft_tiny", **SMALL_RFT), tmp_path)
    assert not (tmp_path / "result.json").exists()
    main.run(experiment("rft_tiny", **SMALL_RFT), tmp_path)
    assert comparable(tmp_path) == comparable(finished)
    assert training_files(tmp_path) == training_files(finished)


def test_pass_rates_are_measured_resumed_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    main.run(experiment("rft_tiny", **DIFFICULTY), tmp_path / "run")
    path = tmp_path / "run" / "pass_rates.jsonl"
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()[1:]]
    assert len({line["id"] for line in lines}) == len(lines) > 16
    assert all(0 <= line["passes"] <= line["samples"] == 4 for line in lines)

    # A killed run left some whole lines and a part of one.
    path.write_text("\n".join(whole.splitlines()[:13]) + '\n{"id": "gsm')
    main.run(experiment("rft_tiny", **DIFFICULTY), tmp_path / "run")
    assert path.read_text() == whole, "the noise of a response does not depend on where the run was interrupted"
    assert "12 of" in caplog.text

    # Another policy or other sampling is not mixed in.
    with pytest.raises(UserError) as raised:
        main.run(experiment("rft_tiny", **DIFFICULTY | {"rollout.temperature": 0.5}), tmp_path / "run", force=True)
    assert raised.value.field == "--workdir"

    kept = [line for line in lines if 1 <= line["passes"] <= 3]
    fields = {"questions.pass_rates": path, "training.prompts_per_step": len(kept) + 1}
    with pytest.raises(UserError, match=f"the {len(kept)} training questions") as raised:
        main.run(experiment("rft_tiny", **SMALL_RFT | fields), tmp_path / "filtered")
    assert raised.value.field == "training.prompts_per_step"
    assert "was measured with another" not in caplog.text
