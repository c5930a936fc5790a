"""Launchers of runs on many hosts, on stand-ins for the cloud's command line, for Slurm's and for the hosts themselves."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rpt_jax.config import DataConfig
from rpt_jax.corpus.tokenization import parse_shard
from rpt_jax.distributed.hosts import Hosts, find_hosts
from tests.test_launch import ROOT, Clone

SCRIPTS = ["launch/again.sh", "launch/slurm_gpu.sh", "launch/tpu_pod.sh"]
TOOLS = ["git", "tar", "gzip", "mktemp", "setsid", "tail", "hostname", "pgrep"]
ADDRESSES = "10.0.0.5;10.0.0.7;10.0.0.6"

# Answers as the cloud does, plays the hosts of a slice by a home directory for each, and notes its calls.
GCLOUD = r"""#!{bash}
printf '%s\n' "${{*//$'\n'/ }}" >>"{calls}"
case "$*" in
    *'tpu-vm describe'*) echo '{addresses}' ;;
    *'queued-resources describe'*) head -n 1 "{states}"; sed -i 1d "{states}" ;;
    *'tpu-vm scp'*) for worker in 0 1 2; do cp "$5" "{hosts}/$worker/${{6#*:}}"; done ;;
    *'tpu-vm ssh'*)
        for word; do
            case $word in --command=*) text=${{word#--command=}} ;; --worker=*) which=${{word#--worker=}} ;; esac
        done
        for worker in 0 1 2; do
            [ "$which" = all ] || [ "$which" = "$worker" ] || continue
            (cd "{hosts}/$worker" && HOME=$PWD WORKER=$worker "{bash}" -c "$text") || exit
        done
        ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    clone = Clone(tmp_path)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, clone.root / script)
    for tool in TOOLS:
        (clone.bin / tool).symlink_to(shutil.which(tool))
    return clone


@pytest.fixture
def slice_(clone: Clone, tmp_path: Path) -> Path:
    """A slice of three hosts, on which the repository is; what a run is given is in their files `arguments`."""
    hosts = tmp_path / "hosts"
    for worker in ("0", "1", "2"):
        launch = hosts / worker / "rpt_jax" / "launch"
        launch.mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "again.sh", launch)
        (launch / "local.sh").write_text(
            'printf "%s\\n" "$@" >~/arguments; echo >>~/starts; [ -e ~/ends ] || { trap "exit 75" TERM; '
            "while :; do sleep 0.1; done; }; exit $(cat ~/ends)\n"
        )
    values = {"calls": clone.calls, "addresses": ADDRESSES, "hosts": hosts, "states": tmp_path / "states"}
    clone.add_tool("gcloud", GCLOUD.format(bash=shutil.which("bash"), **values))
    clone.add_tool(
        "curl", f'#!{shutil.which("bash")}\ncase "$*" in */agent-worker-number) printf %s "$WORKER" ;; esac\n'
    )
    return hosts


def wait_for(path: Path, text: str) -> None:
    for _ in range(300):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise TimeoutError(f"{path}: {path.read_text() if path.exists() else 'missing'}")


# --- again.sh ----------------------------------------------------------------------------------------


def again(tmp_path: Path, codes: str, restarts: str = "9") -> tuple[int, int, str]:
    """Run a command that ends with one of `codes` after the other; return the last one, how often it ran, and stderr."""
    command = f'n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n; set -- {codes}; shift $n; eval "$1"'
    script = ["bash", ROOT / "launch" / "again.sh", "bash", "-c", command]
    environ = os.environ | {"RPT_PAUSE": "0", "RPT_RESTARTS": restarts}
    result = subprocess.run(script, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    return result.returncode, int((tmp_path / "n").read_text()), result.stderr


@pytest.mark.parametrize(
    ("codes", "code", "runs"),
    [
        ("'exit 0'", 0, 1),
        ("'exit 75' 'exit 75' 'exit 0'", 0, 3),
        ("'kill -KILL $$' 'kill -ABRT $$' 'exit 0'", 0, 3),
        ("'exit 2'", 2, 1),
        ("'exit 75' 'exit 3'", 3, 2),
        ("'exit 1'", 1, 1),
    ],
)
def test_again_starts_again_what_is_to_be_started_again(tmp_path: Path, codes: str, code: int, runs: int) -> None:
    assert again(tmp_path, codes)[:2] == (code, runs)


def test_again_gives_up(tmp_path: Path) -> None:
    code, runs, said = again(tmp_path, "'exit 75' 'exit 75' 'exit 75' 'exit 75'", restarts="2")
    assert (code, runs) == (1, 3) and "ended with 75 after 2 restarts" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whoever_stops_again_stops_the_command_for_good(tmp_path: Path, number: signal.Signals) -> None:
    command = 'trap "echo saved; sleep 0.3; exit 75" TERM; echo here >here; while :; do sleep 0.1; done'
    # Where the tests run in the background of a script it is ignored, and bash cannot trap what is ignored at its start.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", heard, "bash", ROOT / "launch" / "again.sh", "bash", "-c", command],
        cwd=tmp_path,
        stdout=-1,
        stderr=-1,
        text=True,
    )
    wait_for(tmp_path / "here", "here")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "saved\n", "")


# --- a TPU slice -------------------------------------------------------------------------------------

SETTINGS = {"RPT_TPU_NAME": "mine", "RPT_TPU_ZONE": "z-1", "RPT_TPU_TYPE": "v5p-128", "RPT_TPU_SHARE": "10.0.0.2:/rpt"}
COMMANDS = {
    "create": (
        "gcloud compute tpus queued-resources create mine --node-id=mine --zone=z-1 --accelerator-type=v5p-128 "
        "--runtime-version=v2-alpha-tpuv5"
    ),
    "wait": "gcloud compute tpus queued-resources describe mine --zone=z-1 '--format=value(state.state)'",
    "setup": "gcloud compute tpus tpu-vm scp rpt_jax.tgz mine:rpt_jax.tgz --zone=z-1 --worker=all",
    "run": "gcloud compute tpus tpu-vm describe mine --zone=z-1 '--format=value(networkEndpoints[].ipAddress)'",
    "status": "gcloud compute tpus queued-resources describe mine --zone=z-1 '--format=value(state.state)'",
    "logs": "gcloud compute tpus tpu-vm ssh mine --zone=z-1 --worker=0 '--command=tail -n 50 -f ~/rpt.log'",
    "stop": "gcloud compute tpus tpu-vm ssh mine --zone=z-1 --worker=all '--command=kill -TERM $(cat ~/rpt.pid)'",
    "delete": "gcloud compute tpus queued-resources delete mine --zone=z-1 --force --quiet",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_prints_the_commands_and_runs_none(clone: Clone, slice_: Path, command: str) -> None:
    arguments = ["--config=c.py", "--workdir=/mnt/my run"] if command == "run" else []
    code, lines, err = clone.run("launch/tpu_pod.sh", "--dry-run", command, *arguments, **SETTINGS)
    assert code == 0 and not err and COMMANDS[command] in lines
    assert not clone.calls.exists()
    if command == "setup":
        assert any("sudo mount -t nfs 10.0.0.2:/rpt /mnt/rpt" in line for line in lines)


def test_a_run_starts_on_all_hosts_goes_on_after_75_and_stops(clone: Clone, slice_: Path) -> None:
    (slice_ / "1" / "ends").write_text("75")
    arguments = ["--config=c.py", "--workdir=/mnt/my run"]
    code, _, err = clone.run("launch/tpu_pod.sh", "run", *arguments, **SETTINGS, RPT_PAUSE="0.1", RPT_RESTARTS="1000")
    assert code == 0, err
    for worker in range(3):
        wait_for(slice_ / str(worker) / "arguments", "--process=")
        found = (slice_ / str(worker) / "arguments").read_text().splitlines()
        assert found == [*arguments, "--coordinator=10.0.0.5:8476", "--processes=3", f"--process={worker}"]
    wait_for(slice_ / "1" / "starts", "\n\n\n")
    assert (slice_ / "0" / "starts").read_text() == "\n"
    (slice_ / "1" / "ends").write_text("0")
    wait_for(slice_ / "1" / "rpt.log", "restart 2")
    (slice_ / "1" / "ends").unlink()
    for worker in ("0", "2"):
        pid = int((slice_ / worker / "rpt.pid").read_text())
        os.kill(pid, 0)
    clone.run("launch/tpu_pod.sh", "stop", **SETTINGS)
    for worker in ("0", "2"):
        pid = int((slice_ / worker / "rpt.pid").read_text())
        for _ in range(200):
            state = (
                Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if Path(f"/proc/{pid}").exists()
                else "Z"
            )
            if state == "Z":
                break
            time.sleep(0.05)
        assert state == "Z" and (slice_ / worker / "starts").read_text() == "\n", "stopped, and not started again"


def test_setup_mounts_copies_and_installs_on_every_host(clone: Clone, slice_: Path) -> None:
    clone.add_python("python3")
    bash, sudo = shutil.which("bash"), clone.root.parent / "sudo"
    clone.add_tool("sudo", f'#!{bash}\necho "$WORKER $*" >>"{sudo}"\n')
    clone.add_tool("mountpoint", f"#!{bash}\nexit 1\n")
    for arguments in (["init", "-q"], ["add", "requirements.txt", "launch"]):
        subprocess.run(["git", *arguments], cwd=clone.root, check=True)
    (clone.root / "lies around").touch()
    code, _, err = clone.run("launch/tpu_pod.sh", "setup", **SETTINGS)
    assert code == 0, err
    for worker in range(3):
        there = slice_ / str(worker) / "rpt_jax"
        assert (there / "requirements.txt").read_text() == "jax\n" and not (there / "lies around").exists()
        assert (there / ".venv" / "requirements.stamp").exists()
        assert f"{worker} mount -t nfs 10.0.0.2:/rpt /mnt/rpt" in sudo.read_text()
    assert clone.calls.read_text().splitlines().count("-m pip install -q jax[tpu]<0.13") == 3


def test_waiting_ends_with_the_slice(clone: Clone, slice_: Path, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    code, lines, _ = clone.run("launch/tpu_pod.sh", "wait", **SETTINGS, RPT_PAUSE="0")
    assert code == 0 and lines == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (tmp_path / "states").write_text("FAILED\n")
    code, _, err = clone.run("launch/tpu_pod.sh", "wait", **SETTINGS, RPT_PAUSE="0")
    assert code == 2 and "the slice mine is FAILED" in err


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (["crate"], {}, "'crate' is none of create, wait, setup"),
        ([], {}, "'' is none of"),
        (["run"], {}, "run needs the arguments of rpt_jax.main"),
        (["create"], {"RPT_TPU_TYPE": "v9-8"}, "RPT_TPU_TYPE=v9-8 is none of"),
    ],
)
def test_what_tpu_pod_does_not_know_is_said(clone: Clone, slice_: Path, arguments, settings, sentence: str) -> None:
    code, _, err = clone.run("launch/tpu_pod.sh", *arguments, **settings)
    assert code == 2 and sentence in err


def test_without_the_cloud_s_command_line(clone: Clone) -> None:
    code, _, err = clone.run("launch/tpu_pod.sh", "create")
    assert code == 2 and "gcloud is not on PATH" in err


# --- Slurm -------------------------------------------------------------------------------------------


def submit(clone: Clone, *arguments: str, codes: str = "", **environ: str):
    """Run the batch script as sbatch does, from a copy elsewhere; srun's tasks end with one of `codes` after the other."""
    copy = clone.root.parent / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(clone.root / "launch" / "slurm_gpu.sh", copy)
    clone.add_python("python3")
    bash, calls = shutil.which("bash"), clone.root.parent / "slurm"
    (clone.root.parent / "codes").write_text(codes)
    clone.add_tool(
        "srun",
        f'#!{bash}\necho "srun $*" >>"{calls}"\ncd "{clone.root.parent}"\n'
        'code=$(head -n 1 codes)\nsed -i 1d codes\n[ "$code" != hang ] || { trap "exit 75" TERM; while :; do sleep 0.1; done; }\n'
        "exit $code\n",
    )
    clone.add_tool("scontrol", f'#!{bash}\necho "scontrol $*" >>"{calls}"\n')
    submitted = {"SLURM_SUBMIT_DIR": str(clone.root), "SLURM_JOB_ID": "41", "RPT_PAUSE": "0"}
    process = clone.start(str(copy), *arguments, **submitted | environ)
    return process, calls


def test_slurm_runs_a_task_a_node_and_goes_on_after_75(clone: Clone) -> None:
    process, calls = submit(clone, "--config=c.py", "--workdir=/my runs/1", codes="75\n137\n0\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    [call, *others] = calls.read_text().splitlines()
    assert call == (
        f"srun --kill-on-bad-exit=0 {clone.venv}/bin/python -P -m rpt_jax.main --config.checkpoint.grace_seconds=240 "
        "--config=c.py --workdir=/my runs/1"
    )
    assert others == [call, call], "and nothing goes back into the queue"


@pytest.mark.parametrize(
    ("environ", "shard"), [({"SLURM_ARRAY_TASK_ID": "3"}, "3/64"), ({}, "%a/64")], ids=["array", "none"]
)
def test_slurm_s_array_prepares_a_part_each(clone: Clone, environ: dict[str, str], shard: str) -> None:
    process, calls = submit(clone, "--workdir=/my runs/%a", "--config.data.shard=%a/64", codes="0\n", **environ)
    process.communicate(timeout=60)
    workdir = "/my runs/" + shard.partition("/")[0]
    assert process.returncode == 0 and calls.read_text().endswith(f" --workdir={workdir} --config.data.shard={shard}\n")


def test_slurm_puts_a_job_that_has_to_go_back_into_the_queue(clone: Clone) -> None:
    process, calls = submit(clone, "--config=c.py", codes="hang\n")
    wait_for(calls, "srun")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and calls.read_text().splitlines()[1:] == ["scontrol requeue 41"]


def test_slurm_leaves_alone_what_must_be_mended(clone: Clone) -> None:
    process, calls = submit(clone, "--config=c.py", codes="2\n")
    process.communicate(timeout=60)
    assert process.returncode == 2 and len(calls.read_text().splitlines()) == 1


def test_slurm_s_dry_run_and_a_wrong_directory(clone: Clone, tmp_path: Path) -> None:
    process, calls = submit(clone, "--dry-run", "--config=c.py")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "-m rpt_jax.main" in out and "scontrol requeue 41" in out
    assert not calls.exists() and clone.installs() == 0
    process, _ = submit(clone, "--config=c.py", SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"{tmp_path} is not the repository root" in process.communicate(timeout=60)[1] and process.returncode == 2


# --- JobSet and image --------------------------------------------------------------------------------


def test_the_jobset_has_what_its_schema_requires_and_fits_together() -> None:
    jobset = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    # What Kubernetes asks of each other.
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelizm"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy takes no other"
    [failing] = job["podFailurePolicy"]["rules"]
    assert failing["onExitCodes"]["containerName"] == container["name"] and failing["action"] == "FailJob"
    assert (
        failing["onExitCodes"]["values"] == sorted(failing["onExitCodes"]["values"])
        and 75 not in failing["onExitCodes"]["values"]
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # What a slice asks for.
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["parallelizm"] * container["resources"]["limits"]["google.com/tpu"]
    # What we ask for.
    environ = {entry["name"]: entry.get("value", "3") for entry in container["env"]}
    name = jobset["metadata"]["name"]
    address = f"{name}-{replicated['name']}-0-0.{name}"
    assert find_hosts(None, None, None, environ) == Hosts(address, 8476, job["parallelizm"], 3)
    grace = next(int(a.partition("=")[2]) for a in container["args"] if "grace_seconds" in a)
    assert grace < pod["terminationGracePeriodSeconds"]


def test_the_job_prepares_every_part_of_a_corpus() -> None:
    job = yaml.safe_load((ROOT / "launch" / "gke_prepare.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod, parts = job["spec"]["template"]["spec"], job["spec"]["completions"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy takes no other"
    assert job["spec"]["maxFailedIndexes"] <= parts, "asked for by backoffLimitPerIndex"
    failing, _ = job["spec"]["podFailurePolicy"]["rules"]
    assert failing["onExitCodes"]["containerName"] == container["name"] and 75 not in failing["onExitCodes"]["values"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    [variable] = container["env"]
    asked = dict(argument.removeprefix("--config.data.").partition("=")[::2] for argument in container["args"])
    for index in range(parts):
        shard = asked["shard"].replace(f"$({variable['name']})", str(index))
        assert parse_shard(DataConfig(shard=shard)) == ([index], parts)


def test_the_image_holds_what_a_run_needs() -> None:
    lines = (ROOT / "launch" / "Containerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert copied == ["requirements.txt", "rpt_jax", "configs"] and all((ROOT / path).exists() for path in copied)
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "rpt_jax.main"]'
    assert any(line.startswith("FROM ") and "python:3.12" in line for line in lines)
