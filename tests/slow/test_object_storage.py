"""Runs of the trainer in object storage: on servers of S3 and Google Cloud Storage on this machine, and in memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rpt_jax import convert, doctor, main
from rpt_jax.infra.storage import RemoteCopy
from tests.helpers.memory_files import empty_memory_files
from tests.helpers.object_storage import BUCKET, gcs_environ, gcs_server, require, s3_server, start_run, wait_until
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import CHILD_SECONDS, free_port
from tests.helpers.run_pages import training_files
from tests.helpers.runs import PRETRAIN, SHORT, comparable, experiment

pytestmark = pytest.mark.slow

FIELDS = PRETRAIN | {"policy.path": "configs/tiny", "training.total_steps": 6, "checkpoint.every_steps": 2}
ARGUMENTS = ["--config=configs/pretrain_tiny.py", *(f"--config.{field}={value}" for field, value in FIELDS.items())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run on the local disk."""
    workdir = tmp_path_factory.mktemp("whole")
    main.run(experiment("pretrain_tiny", **FIELDS), workdir)
    return workdir


def copy_of(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory that another machine makes of a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    copy = RemoteCopy.at(url)
    copy.fetch("--workdir")
    return copy.root


def assert_same_run(workdir: Path, whole: Path) -> None:
    """Assert that a run has the same metrics, result and policy as another one, bit for bit."""
    assert comparable(workdir) == comparable(whole)
    mine, theirs = (json.loads((directory / "result.json").read_text()) for directory in (workdir, whole))
    for result in (mine, theirs):
        for name in ("wall_seconds", "seconds", "config", "policy", "commit"):
            result.pop(name, None)
    assert mine == theirs
    for path in (whole / "policy").iterdir():
        assert (workdir / "policy" / path.name).read_bytes() == path.read_bytes()


def run_killed_and_resumed(arguments: list[str], committed: str, files: Any, tmp_path: Path) -> str:
    """Kill a run once a checkpoint is in object storage, run it to its end on another machine, and return what that prints."""
    first = start_run(tmp_path / "first", *arguments, KILL_AFTER="3")
    wait_until(lambda: files.exists(committed), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start_run(tmp_path / "second", *arguments)
    output, _ = second.communicate(timeout=CHILD_SECONDS)
    assert second.returncode == 0, output
    assert not re.search(r"(pretrain|rpt) 1/", output), "it began anew"
    return output


def test_a_run_in_s3_that_was_killed_resumes_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """The policy is in the bucket as well. The lock of the killed run is taken over, and released at the end."""
    with s3_server() as files:
        files.put(f"{TINY}/", f"{BUCKET}/tiny", recursive=True)
        url = f"s3://{BUCKET}/runs/a"
        policy = f"--config.policy.path=s3://{BUCKET}/tiny"
        arguments = [*ARGUMENTS, f"--workdir={url}", policy]
        output = run_killed_and_resumed(arguments, f"{BUCKET}/runs/a/checkpoints/2.committed", files, tmp_path)
        assert f"Results: {url}" in output
        assert str(tmp_path) not in output and "secret-of-the-test" not in output
        assert not files.exists(f"{BUCKET}/runs/a/lock")
        run = copy_of(url, tmp_path / "third", monkeypatch)
        assert_same_run(run, whole)
        assert json.loads((run / "result.json").read_text())["policy"] == f"{url}/policy"

        # Other tools read the run where it is.
        assert doctor.main(["doctor", "--workdir", url]) == 0
        assert convert.main(["convert", "--from", f"{url}/checkpoints/4", "--to", str(tmp_path / "converted")]) == 0
        assert (tmp_path / "converted" / "model.safetensors").exists()


def test_reinforcement_learning_in_s3_that_was_killed_resumes_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept rollouts of all training steps are in one file, which the killed run had begun."""
    fields = SHORT | {"training.log_rollouts_every": 5}
    main.run(experiment(**fields), tmp_path / "whole")
    with s3_server() as files:
        url = f"s3://{BUCKET}/runs/a"
        arguments = ["--config=configs/rpt_tiny.py", f"--workdir={url}"]
        arguments += [f"--config.{field}={value}" for field, value in fields.items()]
        run_killed_and_resumed(arguments, f"{BUCKET}/runs/a/checkpoints/2.committed", files, tmp_path)
        run = copy_of(url, tmp_path / "third", monkeypatch)
    assert_same_run(run, tmp_path / "whole")
    assert training_files(run) == training_files(tmp_path / "whole")


def test_a_stop_signal_saves_to_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    with s3_server() as files:
        url = f"s3://{BUCKET}/run"
        arguments = [*ARGUMENTS, f"--workdir={url}", "--config.checkpoint.every_steps=100"]
        first = start_run(tmp_path / "first", *arguments, STOP_AFTER="2")
        wait_until(
            lambda: files.exists(f"{BUCKET}/run/metrics.jsonl") and files.size(f"{BUCKET}/run/metrics.jsonl") > 0, first
        )
        first.terminate()
        output, _ = first.communicate(timeout=CHILD_SECONDS)
        assert first.returncode == 75 and f"is in {url}/checkpoints" in output
        assert not files.exists(f"{BUCKET}/run/lock")
        second = start_run(tmp_path / "second", *arguments)
        output, _ = second.communicate(timeout=CHILD_SECONDS)
        assert second.returncode == 0 and "pretrain 1/6" not in output, output
        assert_same_run(copy_of(url, tmp_path / "third", monkeypatch), whole)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([f"--workdir=s3://no-such-bucket-{BUCKET}/run"], "--workdir=s3://no-such-bucket"),
        ([f"--config.policy.path=s3://{BUCKET}/nothing"], f"policy.path=s3://{BUCKET}/nothing has no files"),
    ],
)
def test_what_is_not_there_is_an_error_without_a_traceback(tmp_path: Path, arguments: list[str], field: str) -> None:
    with s3_server():
        process = start_run(tmp_path, *ARGUMENTS, f"--workdir={tmp_path}/run", *arguments)
        output, _ = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == 2
    assert f"error: {field}" in output and "Traceback" not in output


def test_missing_credentials_are_an_error_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        process = start_run(tmp_path, *ARGUMENTS, f"--workdir=s3://{BUCKET}/run")
        output, _ = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == 2
    assert "error: --workdir=s3://" in output and "credentials" in output and "Traceback" not in output


def test_a_run_in_google_cloud_storage_that_was_killed_resumes_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """orbax writes the checkpoints there itself."""
    with gcs_server() as (files, _):
        url = f"gs://{BUCKET}/runs/a"
        committed = f"{BUCKET}/runs/a/checkpoints/2/commit_success.txt"
        run_killed_and_resumed([*ARGUMENTS, f"--workdir={url}"], committed, files, tmp_path)
        assert_same_run(copy_of(url, tmp_path / "third", monkeypatch), whole)


def test_a_bucket_that_stops_answering_ends_the_run(tmp_path: Path) -> None:
    with gcs_server() as (files, server):
        url = f"gs://{BUCKET}/run"
        run = start_run(tmp_path, *ARGUMENTS, f"--workdir={url}", KILL_AFTER="3", IDLE_SECONDS="10")
        wait_until(lambda: files.exists(f"{BUCKET}/run/checkpoints/2/commit_success.txt"), run)
        server.send_signal(signal.SIGSTOP)
        output, _ = run.communicate(timeout=CHILD_SECONDS)
    assert run.returncode == 2
    assert f"error: {url} could not be " in output and "does not answer" in output and "Traceback" not in output


def test_a_request_whose_answer_is_lost_is_made_again() -> None:
    """To a server that does not answer the first request for an object, and then says that there is none."""
    require("gcsfs")
    seen: set[str] = set()
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path not in seen:
                seen.add(path)
                done.wait()
            with contextlib.suppress(OSError):
                self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    program = """
from pathlib import Path
import tensorstore
from rpt_jax.infra import storage

storage.IDLE_SECONDS = 1.0
files, path = storage.RemoteCopy("gs://bucket/run", Path()).open()
print(files.exists(f"{path}/a"), tensorstore.KvStore.open("gs://bucket/").result().read("b").result().state)
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = os.environ | gcs_environ(server.server_port)
        command = [sys.executable, "-c", program]
        output = subprocess.run(command, cwd=ROOT, env=environ, stdout=-1, text=True, timeout=CHILD_SECONDS).stdout
        done.set()
        server.shutdown()
    assert output == "False missing\n"
    assert len(seen) >= 2


def start_processes(url: str, tmp_path: Path) -> list[subprocess.Popen[str]]:
    """Start the two processes of a run with separate cache directories, as on two machines."""
    joint = [f"--workdir={url}", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    return [start_run(tmp_path / f"host{i}", *ARGUMENTS, *joint, f"--process={i}", KILL_AFTER="3") for i in range(2)]


def test_the_processes_of_a_run_share_nothing_but_a_bucket(tmp_path: Path) -> None:
    """All are killed after a checkpoint that both have written, and one process goes on from it elsewhere."""
    with gcs_server() as (files, _):
        url = f"gs://{BUCKET}/run"
        processes = start_processes(url, tmp_path)
        wait_until(lambda: files.exists(f"{BUCKET}/run/checkpoints/2/commit_success.txt"), processes[0])
        parts = files.ls(f"{BUCKET}/run/checkpoints/2/state", detail=False)
        assert len([name for name in parts if "ocdbt.process_" in name]) == 2
        for process in processes:
            process.kill()
            process.wait()
        last = start_run(tmp_path / "elsewhere", *ARGUMENTS, f"--workdir={url}")
        output, _ = last.communicate(timeout=CHILD_SECONDS)
        assert last.returncode == 0 and "pretrain 1/6" not in output, output
        lines = files.cat_file(f"{BUCKET}/run/metrics.jsonl").splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
        assert files.exists(f"{BUCKET}/run/policy/model.safetensors") and files.exists(f"{BUCKET}/run/result.json")


def test_several_processes_cannot_write_checkpoints_to_s3(tmp_path: Path) -> None:
    with s3_server():
        for process in start_processes(f"s3://{BUCKET}/run", tmp_path):
            output, _ = process.communicate(timeout=CHILD_SECONDS)
            assert process.returncode == 2 and "Traceback" not in output
    assert "several processes can be written to gs://" in output


def test_text_at_a_url_is_the_same_corpus_as_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = empty_memory_files(tmp_path, monkeypatch)
    text = "".join(f"Line {i} of a text about the number {i * i}.\n\n" for i in range(200))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    files.pipe_file("/bucket/texts/a.txt", text.encode())
    fields = FIELDS | {"data.source": "path", "data.held_out_documents": 4, "training.total_steps": 2}
    fields |= {"pretrain.trace_weight": 0.0, "pretrain.document_weight": 1.0}
    del fields["data.source_options.documents"], fields["pretrain.rows_per_window"]
    for name, path in (("here", f"{tmp_path}/texts"), ("there", "memory://bucket/texts")):
        main.run(experiment("pretrain_tiny", **fields, **{"data.path": path}), tmp_path / name)
    assert comparable(tmp_path / "here") == comparable(tmp_path / "there")
    corpora = [sorted(path.name for path in (tmp_path / name / "corpus").iterdir()) for name in ("here", "there")]
    assert corpora[0] == corpora[1]
