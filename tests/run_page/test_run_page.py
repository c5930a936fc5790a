"""The page of a run: what it holds, that it is escaped and small, and incomplete runs."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rpt_jax import report
from rpt_jax.infra.rollout_files import read_table, write_table
from rpt_jax.run_page import reading
from rpt_jax.run_page.build import differently_evaluated, render_page, write_page
from rpt_jax.run_page.reading import read_run
from rpt_jax.run_page.server import RunServer
from tests.helpers.diagnosis import write_run as write_sick_run
from tests.helpers.diagnosis import write_training_rollouts
from tests.helpers.run_pages import HOSTILE, write_run

MAX_BYTES = 10_000_000


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_holds_the_rollouts_the_text_and_the_headline(tmp_path: Path) -> None:
    page = write_page([write_run(tmp_path)], tmp_path / "report.html").read_text()
    [run] = data_of(page)["runs"]
    kinds = [group["kind"] for group in run["groups"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"training": 12, "before": 8, "after": 8}
    assert all(len(group["samples"]) == 4 for group in run["groups"])
    first = run["windows"][0]
    assert "".join(first["tokens"]).endswith(
        " the apple cart has seven wheels and Ümit sells 12 pears for $ 4 each"[4:]
    )
    assert sorted(first["direct"]) == ["after", "before"]
    assert "20.0 % (17.0–23.0)" in page and "35.0 % (32.0–38.0)" in page
    assert "python -m rpt_jax.main" in page
    assert len(page) < MAX_BYTES


def test_nothing_in_a_run_is_markup(tmp_path: Path) -> None:
    page = write_page([write_run(tmp_path / "a<b>", hostile=HOSTILE)], tmp_path / "report.html").read_text()
    assert "<img" not in page and "a<b>" not in page
    assert page.count("</script>") == 4
    [run] = data_of(page)["runs"]
    assert HOSTILE in run["groups"][0]["context"]
    assert HOSTILE in run["groups"][0]["samples"][0]["reasoning"]


def test_the_page_has_the_findings_of_the_doctor(tmp_path: Path) -> None:
    sick = write_sick_run(tmp_path, metrics={"ended/length": 0.7})
    page = write_page([sick], tmp_path / "report.html").read_text()
    section = page.partition('<section id="doctor"')[2].partition("</section>")[0]
    assert "<strong>problem</strong> 70% of the responses" in section
    assert "raise rollout.max_new_tokens (now 48)" in section and "loss_rose: not checked" in section


def test_what_the_doctor_quotes_of_a_run_is_not_markup(tmp_path: Path) -> None:
    sick = write_sick_run(tmp_path, metrics={"status/no_box": 0.7}, config={"prompt.template": HOSTILE})
    write_training_rollouts(
        sick, 60, lambda step, p: f"{HOSTILE} {step}" if step > 30 else f"{'abcdefgh'[p]}{step % 7}"
    )
    page = write_page([sick], tmp_path / "report.html").read_text()
    section = page.partition('<section id="doctor"')[2].partition("</section>")[0]
    assert section.count("&lt;img") == 2 and "<img" not in page


def test_a_large_run_stays_small_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ROLLOUT_CHARACTERS", 20_000)
    monkeypatch.setattr(reading, "EVALUATION_CHARACTERS", 5_000)
    run = read_run(write_run(tmp_path, steps=60, prompts=2))
    training = [group for group in run.groups if group["kind"] == "training"]
    assert 10 < len(training) < 120 and {training[0]["step"], training[-1]["step"]} == {1, 60}
    assert len(run.windows) == 1 and len(run.left_out) == 2


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "run_config.json", "rollouts/training_000001.parquet", "rollouts/text_000006.parquet"]
)
@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown(tmp_path: Path, missing: str, damaged: bool) -> None:
    path = write_run(tmp_path) / missing
    content = path.read_bytes()
    path.unlink()
    if damaged:
        path.write_bytes(content[: len(content) // 2] + b"\n\n")
    run = read_run(tmp_path)
    assert run.groups and render_page([run])
    is_optional = missing.endswith("text_000006.parquet") and not damaged
    assert bool(run.problems) != is_optional


@pytest.mark.parametrize("name", ["training_000001", "evaluation_000006", "text_000006"])
def test_a_file_without_a_column_is_named_and_the_rest_is_shown(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path) / "rollouts" / f"{name}.parquet"
    write_table(path, read_table(path).drop_columns(["split"]))
    run = read_run(tmp_path)
    assert run.groups and render_page([run]) and any(path.name in problem for problem in run.problems)


def test_a_result_with_text_in_place_of_a_number_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "wall_seconds": "12"}))
    run = read_run(tmp_path)
    assert render_page([run]) and any("wall_seconds='12'" in problem for problem in run.problems)


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run_config.json").write_text("{}")
    assert report.main(["report", f"--workdir={tmp_path}"]) == 0
    assert "no step yet" in (tmp_path / "report.html").read_text()


def test_a_run_of_another_version_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "run_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3, "version": "0.1.0"}))
    assert any("0.1.0" in problem for problem in read_run(tmp_path).problems)


def test_runs_are_compared_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", steps=4)
    output = tmp_path / "page.html"
    assert report.main(["report", f"--workdir={first}", f"--workdir={second}", f"--output={output}"]) == 0
    capsys.readouterr()
    assert [run["name"] for run in data_of(output.read_text())["runs"]] == ["first", "second"]


def test_runs_that_are_evaluated_on_different_corpora_are_named(tmp_path: Path) -> None:
    paths = {name: write_run(tmp_path / name) / "run_config.json" for name in ("first", "second")}
    runs = [read_run(path.parent) for path in paths.values()]
    assert differently_evaluated(runs) == [] and "need not be comparable" not in render_page(runs)
    content = json.loads(paths["second"].read_text())
    content["config"] |= {"data.path": "other/texts", "data.entropy_threshold": 1.5, "optimizer.learning_rate": 1.0}
    paths["second"].write_text(json.dumps(content))
    runs = [read_run(path.parent) for path in paths.values()]
    assert differently_evaluated(runs) == ["data.path"] and "need not be comparable" in render_page(runs)


def test_the_server_gives_a_new_version_when_the_run_has_changed(tmp_path: Path) -> None:
    run = write_run(tmp_path, finished=False)
    with RunServer([run], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def get(path: str, **headers: str) -> str:
            return urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers)).read().decode()

        assert data_of(get(""))["live"]
        version = get("version")
        assert version == get("version")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "reward/drawn_mean": 0.5}\n')
        assert version != get("version")
        assert data_of(get(""))["runs"][0]["metrics"]["reward/drawn_mean"][0][-1] == 7
        assert get("", Host="127.0.0.1")  # As of a browser, if the port is 80.
        for path, headers in (("../run_config.json", {}), ("", {"Host": "other.example:80"})):
            with pytest.raises(urllib.error.HTTPError):
                get(path, **headers)
        server.shutdown()
