"""The launchers of runs on several hosts: launch/again.sh, tpu_pod.sh, slurm_gpu.sh and the Kubernetes manifests.

Tests marked `stand_in` run a script against stand-ins for gcloud, Slurm and the hosts (see tests/helpers/launchers.py). They
cover the logic of the scripts and the commands that they issue; no test runs a launcher on a real cluster.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rpt_jax.config import DataConfig
from rpt_jax.corpus.tokenization import parse_shard
from rpt_jax.distributed.hosts import Hosts, find_hosts
from tests.helpers.launchers import Clone, wait_for_text, wait_until
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

stand_in = pytest.mark.stand_in

SCRIPTS = ["launch/again.sh", "launch/slurm_gpu.sh", "launch/tpu_pod.sh"]
TOOLS = ["git", "tar", "gzip", "setsid", "tail", "hostname", "pgrep"]
ADDRESSES = "10.0.0.5;10.0.0.7;10.0.0.6"

# A stand-in for gcloud: records its calls, answers queries, and imitates the hosts of a slice with one home directory for each.
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

# A stand-in for launch/local.sh on a host. Writes its arguments to ~/arguments and a line to ~/starts. Exits with the code in
# ~/ends if that file exists; otherwise runs until SIGTERM and exits with 75.
LOCAL = r"""
printf "%s\n" "$@" >~/arguments
echo >>~/starts
[ -e ~/ends ] || { trap "exit 75" TERM; echo hanging >state; while :; do sleep 0.1; done; }
exit $(cat ~/ends)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path, SCRIPTS, TOOLS)


@pytest.fixture
def hosts(clone: Clone, tmp_path: Path) -> Path:
    """The parent of the home directories of a slice's three hosts (0, 1 and 2), each with a copy of the repository."""
    hosts = tmp_path / "hosts"
    for worker in ("0", "1", "2"):
        launch = hosts / worker / "rpt_jax" / "launch"
        launch.mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "again.sh", launch)
        (launch / "local.sh").write_text(LOCAL)
    bash = shutil.which("bash")
    text = GCLOUD.format(bash=bash, calls=clone.calls, addresses=ADDRESSES, hosts=hosts, states=tmp_path / "states")
    clone.add_tool("gcloud", text)
    # The metadata server of a host, asked for the number of the worker.
    clone.add_tool("curl", f'#!{bash}\ncase "$*" in */agent-worker-number) printf %s "$WORKER" ;; esac\n')
    return hosts


def has_ended(pid: int) -> bool:
    """Return whether a process is gone or a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


# --- again.sh ---


def run_again(tmp_path: Path, endings: str, restarts: str = "9") -> tuple[int, int, str]:
    """Run again.sh with a command whose n-th run ends with the n-th of `endings`.

    Returns: the exit code of again.sh, the number of runs, and stderr.
    """
    command = f'n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n; set -- {endings}; shift $n; eval "$1"'
    script = ["bash", ROOT / "launch" / "again.sh", "bash", "-c", command]
    environ = os.environ | {"RPT_PAUSE": "0", "RPT_RESTARTS": restarts}
    result = subprocess.run(script, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=CHILD_SECONDS)
    return result.returncode, int((tmp_path / "n").read_text()), result.stderr


@pytest.mark.parametrize(
    ("endings", "code", "runs"),
    [
        ("'exit 0'", 0, 1),
        ("'exit 75' 'exit 75' 'exit 0'", 0, 3),
        ("'kill -KILL $$' 'kill -ABRT $$' 'exit 0'", 0, 3),
        ("'exit 2'", 2, 1),
        ("'exit 75' 'exit 3'", 3, 2),
        ("'exit 1'", 1, 1),
    ],
)
def test_command_restarts_after_code_75_and_signals_only(tmp_path: Path, endings: str, code: int, runs: int) -> None:
    assert run_again(tmp_path, endings)[:2] == (code, runs)


def test_restarts_are_limited(tmp_path: Path) -> None:
    code, runs, stderr = run_again(tmp_path, "'exit 75' 'exit 75' 'exit 75' 'exit 75'", restarts="2")
    assert (code, runs) == (1, 3)
    assert "exit code 75 after 2 restarts" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_command_without_a_restart(tmp_path: Path, number: signal.Signals) -> None:
    command = 'trap "echo saved; sleep 0.3; exit 75" TERM; echo here >here; while :; do sleep 0.1; done'
    # SIGINT is ignored if the tests run in the background of a script, and bash cannot trap a signal that it inherits as ignored.
    restore = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", restore, "bash", ROOT / "launch" / "again.sh", "bash", "-c", command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_text(tmp_path / "here", "here")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=CHILD_SECONDS)
    assert (process.returncode, stdout, stderr) == (75, "saved\n", "")


# --- tpu_pod.sh ---

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


@stand_in
@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_prints_commands_without_running_them(clone: Clone, hosts: Path, command: str) -> None:
    arguments = ["--config=c.py", "--workdir=/mnt/my run"] if command == "run" else []
    code, lines, stderr = clone.run("launch/tpu_pod.sh", "--dry-run", command, *arguments, **SETTINGS)
    assert code == 0
    assert not stderr
    assert COMMANDS[command] in lines
    assert not clone.calls.exists()
    if command == "setup":
        assert any("sudo mount -t nfs 10.0.0.2:/rpt /mnt/rpt" in line for line in lines)


@stand_in
def test_run_starts_on_all_hosts_restarts_after_75_and_stops(clone: Clone, hosts: Path) -> None:
    (hosts / "1" / "ends").write_text("75")
    arguments = ["--config=c.py", "--workdir=/mnt/my run"]
    code, _, stderr = clone.run(
        "launch/tpu_pod.sh", "run", *arguments, **SETTINGS, RPT_PAUSE="0.1", RPT_RESTARTS="1000"
    )
    assert code == 0, stderr

    # Every host starts with its own process number; host 1 restarts after code 75.
    for worker in range(3):
        wait_for_text(hosts / str(worker) / "arguments", "--process=")
        found = (hosts / str(worker) / "arguments").read_text().splitlines()
        assert found == [*arguments, "--coordinator=10.0.0.5:8476", "--processes=3", f"--process={worker}"]
    wait_for_text(hosts / "1" / "starts", "\n\n\n")
    assert (hosts / "0" / "starts").read_text() == "\n"
    (hosts / "1" / "ends").write_text("0")
    wait_for_text(hosts / "1" / "rpt.log", "restart 2")
    (hosts / "1" / "ends").unlink()

    # `stop` ends the run on the other hosts, without a restart.
    pids = {worker: int((hosts / worker / "rpt.pid").read_text()) for worker in ("0", "2")}
    for pid in pids.values():
        os.kill(pid, 0)
    clone.run("launch/tpu_pod.sh", "stop", **SETTINGS)
    for worker, pid in pids.items():
        wait_until(lambda pid=pid: has_ended(pid), f"the end of process {pid}")
        assert (hosts / worker / "starts").read_text() == "\n"


@stand_in
def test_setup_mounts_copies_and_installs_on_every_host(clone: Clone, hosts: Path) -> None:
    clone.add_python("python3")
    bash, sudo_calls = shutil.which("bash"), clone.root.parent / "sudo"
    clone.add_tool("sudo", f'#!{bash}\necho "$WORKER $*" >>"{sudo_calls}"\n')
    clone.add_tool("mountpoint", f"#!{bash}\nexit 1\n")
    for arguments in (["init", "-q"], ["add", "requirements.txt", "launch"]):
        subprocess.run(["git", *arguments], cwd=clone.root, check=True)
    (clone.root / "untracked").touch()
    code, _, stderr = clone.run("launch/tpu_pod.sh", "setup", **SETTINGS)
    assert code == 0, stderr
    for worker in range(3):
        copy = hosts / str(worker) / "rpt_jax"
        assert (copy / "requirements.txt").read_text() == "jax\n"
        assert not (copy / "untracked").exists()
        assert (copy / ".venv" / "requirements.stamp").exists()
        assert f"{worker} mount -t nfs 10.0.0.2:/rpt /mnt/rpt" in sudo_calls.read_text()
    assert clone.pip_calls().count("-m pip install -q -r requirements/tpu.txt") == 3


@stand_in
def test_wait_ends_when_the_slice_is_active_or_has_failed(clone: Clone, hosts: Path, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    code, lines, _ = clone.run("launch/tpu_pod.sh", "wait", **SETTINGS, RPT_PAUSE="0")
    assert code == 0
    assert lines == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (tmp_path / "states").write_text("FAILED\n")
    code, _, stderr = clone.run("launch/tpu_pod.sh", "wait", **SETTINGS, RPT_PAUSE="0")
    assert code == 2
    assert "the slice mine is FAILED" in stderr


@stand_in
@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["crate"], {}, "'crate' is not one of: create, wait, setup"),
        ([], {}, "'' is not one of"),
        (["run"], {}, "run needs the arguments of rpt_jax.main"),
        (["create"], {"RPT_TPU_TYPE": "v9-8"}, "RPT_TPU_TYPE=v9-8 is not one of"),
    ],
)
def test_wrong_arguments_are_refused(
    clone: Clone, hosts: Path, arguments: list[str], settings: dict[str, str], message: str
) -> None:
    code, _, stderr = clone.run("launch/tpu_pod.sh", *arguments, **settings)
    assert code == 2
    assert message in stderr


@stand_in
def test_missing_gcloud_is_reported(clone: Clone) -> None:
    code, _, stderr = clone.run("launch/tpu_pod.sh", "create")
    assert code == 2
    assert "gcloud is not on PATH" in stderr


# --- slurm_gpu.sh ---

# A stand-in for srun: records its call and exits with the next code in the file `codes`. If that is "hang", it runs until SIGTERM
# and exits with 75.
SRUN = r"""#!{bash}
echo "srun $*" >>"{calls}"
cd "{directory}"
code=$(head -n 1 codes)
sed -i 1d codes
[ "$code" != hang ] || {{ trap "exit 75" TERM; echo hanging >state; while :; do sleep 0.1; done; }}
exit $code
"""


def submit(clone: Clone, *arguments: str, codes: str = "", **environment: str) -> tuple[subprocess.Popen[str], Path]:
    """Run the batch script as sbatch does: as a copy in another directory.

    Args:
      codes: what successive calls of srun end with, one on each line.
    Returns: the process, and the file in which calls of Slurm's commands are recorded.
    """
    copy = clone.root.parent / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(clone.root / "launch" / "slurm_gpu.sh", copy)
    clone.add_python("python3")
    bash, calls = shutil.which("bash"), clone.root.parent / "slurm"
    (clone.root.parent / "codes").write_text(codes)
    clone.add_tool("srun", SRUN.format(bash=bash, calls=calls, directory=clone.root.parent))
    clone.add_tool("scontrol", f'#!{bash}\necho "scontrol $*" >>"{calls}"\n')
    submitted = {"SLURM_SUBMIT_DIR": str(clone.root), "SLURM_JOB_ID": "41", "RPT_PAUSE": "0"}
    process = clone.start(str(copy), *arguments, **submitted | environment)
    return process, calls


@stand_in
def test_job_runs_one_process_per_node_and_restarts_after_75_and_signals(clone: Clone) -> None:
    process, calls = submit(clone, "--config=c.py", "--workdir=/my runs/1", codes="75\n137\n0\n")
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    [call, *others] = calls.read_text().splitlines()
    assert call == (
        f"srun --kill-on-bad-exit=0 {clone.venv}/bin/python -P -m rpt_jax.main --config.checkpoint.grace_seconds=240 "
        "--config=c.py --workdir=/my runs/1"
    )
    assert others == [call, call], "the job must not be requeued"


@stand_in
@pytest.mark.parametrize(
    ("environment", "shard"), [({"SLURM_ARRAY_TASK_ID": "3"}, "3/64"), ({}, "%a/64")], ids=["array", "no array"]
)
def test_array_index_is_filled_in(clone: Clone, environment: dict[str, str], shard: str) -> None:
    process, calls = submit(clone, "--workdir=/my runs/%a", "--config.data.shard=%a/64", codes="0\n", **environment)
    process.communicate(timeout=600)
    workdir = "/my runs/" + shard.partition("/")[0]
    assert process.returncode == 0
    assert calls.read_text().endswith(f" --workdir={workdir} --config.data.shard={shard}\n")


@stand_in
def test_job_is_requeued_after_sigterm(clone: Clone) -> None:
    process, calls = submit(clone, "--config=c.py", codes="hang\n")
    wait_for_text(calls.parent / "state", "hanging")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 75
    assert calls.read_text().splitlines()[1:] == ["scontrol requeue 41"]


@stand_in
def test_job_ends_after_an_error(clone: Clone) -> None:
    process, calls = submit(clone, "--config=c.py", codes="2\n")
    process.communicate(timeout=600)
    assert process.returncode == 2
    assert len(calls.read_text().splitlines()) == 1


@stand_in
def test_dry_run_of_a_job_prints_its_commands(clone: Clone) -> None:
    process, calls = submit(clone, "--dry-run", "--config=c.py")
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "-m rpt_jax.main" in stdout
    assert "scontrol requeue 41" in stdout
    assert not calls.exists()
    assert not clone.pip_calls()


@stand_in
def test_job_from_another_directory_is_refused(clone: Clone, tmp_path: Path) -> None:
    process, _ = submit(clone, "--config=c.py", SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"{tmp_path} is not the repository root" in process.communicate(timeout=600)[1]
    assert process.returncode == 2


# --- Kubernetes ---


def test_jobset_is_valid_and_consistent() -> None:
    jobset = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]

    # Constraints of Kubernetes between fields.
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    [failing] = job["podFailurePolicy"]["rules"]
    assert failing["action"] == "FailJob"
    assert failing["onExitCodes"]["containerName"] == container["name"]
    codes = failing["onExitCodes"]["values"]
    assert codes == sorted(codes)
    assert 75 not in codes
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]

    # The pods cover the slice.
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]

    # The processes find each other, and have time to save.
    environment = {entry["name"]: entry.get("value", "3") for entry in container["env"]}
    name = jobset["metadata"]["name"]
    address = f"{name}-{replicated['name']}-0-0.{name}"
    assert find_hosts(None, None, None, environment) == Hosts(address, 8476, job["parallelism"], 3)
    grace = next(int(a.partition("=")[2]) for a in container["args"] if "grace_seconds" in a)
    assert grace < pod["terminationGracePeriodSeconds"]


def test_prepare_job_covers_every_shard_of_a_corpus() -> None:
    job = yaml.safe_load((ROOT / "launch" / "gke_prepare.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod, shards = job["spec"]["template"]["spec"], job["spec"]["completions"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    assert 0 < job["spec"]["parallelism"] <= shards
    assert job["spec"]["maxFailedIndexes"] <= shards, "required with backoffLimitPerIndex"
    failing, _ = job["spec"]["podFailurePolicy"]["rules"]
    assert failing["onExitCodes"]["containerName"] == container["name"]
    assert 75 not in failing["onExitCodes"]["values"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    [variable] = container["env"]
    options = dict(argument.removeprefix("--config.data.").partition("=")[::2] for argument in container["args"])
    for index in range(shards):
        shard = options["shard"].replace(f"$({variable['name']})", str(index))
        assert parse_shard(DataConfig(shard=shard)) == ([index], shards)


def test_image_copies_files_that_exist() -> None:
    lines = (ROOT / "launch" / "Containerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert copied
    for path in copied:
        assert (ROOT / path).exists()
