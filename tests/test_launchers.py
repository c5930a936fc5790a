"""The launchers of runs on several hosts: launch/again.sh, tpu_pod.sh, slurm_gpu.sh and the Kubernetes manifests.

Tests marked `stand_in` run a script against stand-ins for gcloud and the hosts (see tests/helpers/launchers.py). They cover the
logic of the scripts and the commands that they issue. tests/slow/test_slurm.py runs slurm_gpu.sh on a real Slurm.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpt_jax.corpus.tokenization import parse_shard
from rpt_jax.distributed.hosts import find_hosts
from rpt_jax.main import load_experiment, main
from rpt_jax.model.model_config import preset
from rpt_jax.study import __main__ as study
from tests.helpers.launchers import Clone, wait_for_text, wait_until
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, WITH_SIGNALS

stand_in = pytest.mark.stand_in

SCRIPTS = ["launch/again.sh", "launch/slurm_gpu.sh", "launch/tpu_host.sh", "launch/tpu_pod.sh"]
TOOLS = ["git", "grep", "tar", "gzip", "id", "setsid", "tail", "hostname", "pgrep", "true"]
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
        ("'exit 120'", 120, 1),
        ("'exit 75' 'exit 3'", 3, 2),
        ("'exit 1'", 1, 1),
        ("'kill -KILL $$' 'exit 75' 'kill -KILL $$' 'kill -KILL $$' 'kill -KILL $$' 'exit 0'", 137, 5),
    ],
)
def test_command_restarts_after_code_75_and_signals_only(tmp_path: Path, endings: str, code: int, runs: int) -> None:
    assert run_again(tmp_path, endings)[:2] == (code, runs)


def test_restarts_are_limited(tmp_path: Path) -> None:
    code, runs, stderr = run_again(tmp_path, "'exit 75' 'exit 75' 'exit 75' 'exit 75'", restarts="2")
    assert (code, runs) == (1, 3)
    assert "exit code 75 after 2 restarts" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_stops_the_command_without_a_restart(tmp_path: Path, number: signal.Signals) -> None:
    command = 'trap "echo saved; sleep 0.3; exit 75" TERM; echo here >here; while :; do sleep 0.1; done'
    process = subprocess.Popen(
        [*WITH_SIGNALS, "bash", ROOT / "launch" / "again.sh", "bash", "-c", command],
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
        assert any("launch/tpu_host.sh" in line and "10.0.0.2:/rpt" in line for line in lines)


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

    # Another run is refused before anything starts, also on host 1, where the first one has ended.
    before = [(hosts / worker / "rpt.pid").read_text() for worker in "012"]
    code, _, stderr = clone.run("launch/tpu_pod.sh", "run", *arguments, **SETTINGS)
    assert code == 2 and "launch: a run is active on" in stderr and "end it first, with 'stop'" in stderr
    assert [(hosts / worker / "rpt.pid").read_text() for worker in "012"] == before

    # `stop` ends the run on the other hosts, without a restart.
    pids = {worker: int((hosts / worker / "rpt.pid").read_text()) for worker in ("0", "2")}
    for pid in pids.values():
        os.kill(pid, 0)
    clone.run("launch/tpu_pod.sh", "stop", **SETTINGS)
    for worker, pid in pids.items():
        wait_until(lambda pid=pid: has_ended(pid), f"the end of process {pid}")
        assert (hosts / worker / "starts").read_text() == "\n"
    # After that, and after a restart of the hosts that has left the files, a run starts.
    for worker in "012":
        (hosts / worker / "ends").write_text("0")
    (hosts / "0" / "rpt.pid").write_text(str(os.getpid()))
    assert clone.run("launch/tpu_pod.sh", "run", *arguments, **SETTINGS)[0] == 0
    wait_for_text(hosts / "0" / "starts", "\n\n")


# Stand-ins for the system of a host: `sudo` records its calls. The first update of the package lists fails, as when another
# process holds their lock; apt knows Python 3.12 once the archive of deadsnakes was added.
SUDO = r"""#!{bash}
echo "$WORKER $*" >>"{calls}"
case "$*" in
    *' update') [ -e ~/updated ] || {{ echo >~/updated; echo "E: Could not get lock" >&2; exit 100; }} ;;
    mkdir*) {mkdir} "${{@:2}}" ;;
    *add-apt-repository*) echo >~/deadsnakes ;;
esac
"""
APT_CACHE = "#!{bash}\n[ -e ~/deadsnakes ]\n"


def set_up_slice(clone: Clone, mount: Path, mkdir: str) -> tuple[int, str, list[str]]:
    """Run `tpu_pod.sh setup`; `mkdir` runs in place of `sudo mkdir`. Returns: exit code, stderr, and the calls of sudo."""
    clone.add_python("python3")
    bash, calls = shutil.which("bash"), clone.root.parent / "sudo"
    clone.add_tool("sudo", SUDO.format(bash=bash, calls=calls, mkdir=mkdir))
    clone.add_tool("apt-cache", APT_CACHE.format(bash=bash))
    clone.add_tool("mountpoint", f"#!{bash}\nexit 1\n")
    for arguments in (["init", "-q"], ["add", "requirements.txt", "launch"]):
        subprocess.run(["git", *arguments], cwd=clone.root, check=True)
    (clone.root / "untracked").touch()
    settings = SETTINGS | {"RPT_TPU_MOUNT": str(mount), "RPT_PAUSE": "0"}
    code, _, stderr = clone.run("launch/tpu_pod.sh", "setup", **settings)
    return code, stderr, calls.read_text().splitlines()


@stand_in
def test_setup_installs_python_mounts_and_copies_on_every_host(clone: Clone, hosts: Path, tmp_path: Path) -> None:
    mount = tmp_path / "shared files"
    code, stderr, calls = set_up_slice(clone, mount, "mkdir")
    assert code == 0, stderr
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=900"
    for worker in range(3):
        copy = hosts / str(worker) / "rpt_jax"
        assert (copy / "requirements.txt").read_text() == "jax\n"
        assert not (copy / "untracked").exists()
        assert (copy / ".venv" / "requirements.stamp").exists()
        assert [call.removeprefix(f"{worker} ") for call in calls if call.startswith(f"{worker} ")] == [
            f"{apt} update",
            f"{apt} update",
            f"{apt} install -y software-properties-common",
            "add-apt-repository -n -y ppa:deadsnakes/ppa",
            f"{apt} update",
            f"{apt} install -y python3.12 python3.12-venv python3.12-dev gcc nfs-common",
            f"mkdir -p {mount}",
            f"mount -t nfs 10.0.0.2:/rpt {mount}",
        ]
    assert sum(call.endswith("requirements/tpu.txt") for call in clone.pip_calls()) == 3


@stand_in
def test_a_shared_directory_that_stays_unwritable_is_named(clone: Clone, hosts: Path, tmp_path: Path) -> None:
    mount = tmp_path / "shared"
    code, stderr, calls = set_up_slice(clone, mount, "true")
    assert code == 1
    assert f"cannot write to {mount}: change the owner of 10.0.0.2:/rpt on its server" in stderr
    assert calls[-1] == f"0 chown {os.getuid()}:{os.getgid()} {mount}"


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


# --- slurm_gpu.sh: what needs no Slurm; the rest is in tests/slow/test_slurm.py ---


@stand_in
@pytest.mark.parametrize(
    ("environment", "shard"), [({"SLURM_ARRAY_TASK_ID": "3"}, "3/64"), ({}, "%a/64")], ids=["array", "no array"]
)
def test_dry_run_of_a_job_prints_its_commands(clone: Clone, environment: dict[str, str], shard: str) -> None:
    clone.add_python("python3")
    arguments = ["--dry-run", "--config=c.py", "--workdir=/runs/%a", "--config.data.shard=%a/64"]
    job = {"SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "32"}
    code, lines, _ = clone.run("launch/slurm_gpu.sh", *arguments, **job | environment)
    assert code == 0
    assert shlex.split(lines[0]) == [
        *("srun", "--kill-on-bad-exit=0", "--cpus-per-task=32", f"{clone.venv}/bin/python", "-P", "-m", "rpt_jax.main"),
        *("--config.checkpoint.grace_seconds=240", "--config=c.py"),
        *(f"--workdir=/runs/{shard.partition('/')[0]}", f"--config.data.shard={shard}"),
    ]
    assert lines[-1].split() == ["scontrol", "requeue", "41"]
    assert not clone.pip_calls()


@stand_in
def test_job_from_another_directory_is_refused(clone: Clone, tmp_path: Path) -> None:
    code, _, stderr = clone.run("launch/slurm_gpu.sh", "--config=c.py", SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"{tmp_path} is not the repository root" in stderr
    assert code == 2


# --- Kubernetes ---


def pod_of(manifest: str) -> dict[str, Any]:
    """Return the pod template of a manifest of a Job or of a JobSet with one Job."""
    spec = yaml.safe_load((ROOT / "launch" / manifest).read_text())["spec"]
    for replicated in spec.get("replicatedJobs", []):
        spec = replicated["template"]["spec"]
    return spec["template"]["spec"]


def assert_fails_for_good(rules: list[dict[str, Any]], container: str) -> None:
    """Assert that a preempted pod never fails a Job for good, and that a mistake or too little memory (137) always do."""
    preempted, failing = rules
    assert preempted["action"] in ("Count", "Ignore")
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert failing["action"] == "FailJob"
    assert failing["onExitCodes"] == {"containerName": container, "operator": "In", "values": [1, 2, 3, 4, 137]}


@pytest.mark.parametrize("manifest", [path.name for path in sorted((ROOT / "launch").glob("gke_*.yaml"))])
def test_the_arguments_of_a_manifest_describe_a_run_in_a_bucket(manifest: str, capsys) -> None:
    [container] = pod_of(manifest)["containers"]
    arguments = [argument.replace("$(SHARD)", "3") for argument in container["args"]]
    assert main(["main", *arguments, "--describe"]) == 0
    assert "matmul parameters" in capsys.readouterr().out
    # The image has configs, but neither weights nor texts.
    experiment = load_experiment(["main", *arguments])
    paths = [experiment.policy.path, experiment.data.path, *filter(None, [experiment.data.prepared])]
    paths += [argument.removeprefix("--workdir=") for argument in arguments if argument.startswith("--workdir=")]
    assert all(path.startswith("gs://BUCKET/") for path in paths), paths


def test_the_jobset_trains_on_what_the_prepare_job_writes() -> None:
    def arguments(manifest: str) -> dict[str, str]:
        return dict(argument.split("=", 1) for argument in pod_of(manifest)["containers"][0]["args"])

    prepare, train = arguments("gke_prepare.yaml"), arguments("gke_jobset.yaml")
    assert train["--config.data.prepared"] == prepare["--workdir"] != train["--workdir"]
    assert train["--config.data.path"] == prepare["--config.data.path"]


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
    assert_fails_for_good(job["podFailurePolicy"]["rules"], container["name"])
    assert set(container["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage", "google.com/tpu"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # The weights in bfloat16, the policy of a run that was finished before, and the one that replaces it, in float32.
    parameters = preset(load_experiment(["main", *container["args"]]).policy.preset).parameters
    storage = int(container["resources"]["limits"]["ephemeral-storage"].removesuffix("Gi"))
    assert storage * 2**30 > (2 + 4 + 4) * parameters
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"

    # The pods cover the slice.
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]

    # The processes find each other, and have time to save.
    environment = {entry["name"]: entry.get("value", "3") for entry in container["env"]}
    name = jobset["metadata"]["name"]
    address = f"{name}-{replicated['name']}-0-0.{name}"
    found = find_hosts(None, None, None, environment)
    assert found and found[:4] == (address, 8476, job["parallelism"], 3)
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
    assert_fails_for_good(job["spec"]["podFailurePolicy"]["rules"], container["name"])
    assert set(container["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage", "google.com/tpu"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    [variable] = container["env"]
    options = dict(argument.removeprefix("--config.data.").partition("=")[::2] for argument in container["args"])
    for index in range(shards):
        shard = options["shard"].replace(f"$({variable['name']})", str(index))
        assert parse_shard(shard) == (index, shards)


def test_image_copies_files_that_exist() -> None:
    lines = (ROOT / "launch" / "Containerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert copied
    for path in copied:
        assert (ROOT / path).exists()


# --- SkyPilot ---


def sky_arguments(task: dict[str, Any], **environ: str) -> list[str]:
    """Return the arguments of rpt_jax.main with which a node of a SkyPilot task starts the launchers."""
    script = f'exec() {{ printf "%s\n" "$@"; }}\n{task["run"]}'
    environment = os.environ | task["envs"] | environ
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    command, *arguments = result.stdout.split("launch/local.sh\n")
    assert command.split() == ["bash", "launch/again.sh", "bash"]
    return arguments[0].splitlines()


def test_the_task_of_skypilot_describes_a_run_in_a_bucket(capsys) -> None:
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    for path in re.findall(r"(?:requirements|launch)[\w/$]*\.(?:txt|sh)", task["setup"]):
        assert (ROOT / path.replace("$PLUGIN", task["envs"]["PLUGIN"])).exists(), path

    arguments = sky_arguments(task, SKYPILOT_NUM_NODES="1")
    assert arguments[1] == f"--workdir={task['envs']['WORKDIR']}" and task["envs"]["WORKDIR"].startswith("gs://")
    assert main(["main", *arguments, "--describe"]) == 0
    assert "matmul parameters" in capsys.readouterr().out


def test_the_nodes_of_a_task_of_skypilot_are_the_processes_of_a_run() -> None:
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sky_arguments(task, **node))
    found = find_hosts(flags["coordinator"], int(flags["processes"]), int(flags["process"]), {})
    assert found and found[:4] == ("10.0.0.1", 8476, 2, 1)


# --- studies, docs/guides/study.md ---


def study_snippet(language: str) -> str:
    [code] = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs/guides/study.md").read_text(), re.M | re.S)
    return code


def part_of(arguments: list[str]) -> tuple[int, int]:
    """Return the part of a study that the arguments of its command name, after the flags are parsed."""
    module, *flags = arguments
    assert module == "rpt_jax.study"
    return parse_shard(study.make_parser().parse_args(flags).part, "--part")


def test_the_tasks_of_the_slurm_array_are_the_parts_of_a_study(tmp_path: Path) -> None:
    """The script runs with a stand-in for Python, which prints its arguments."""
    script = tmp_path / "study.sbatch"
    script.write_text(study_snippet("bash"))
    [(first, last)] = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script.read_text(), re.M)
    parts = []
    for task in range(int(first), int(last) + 1):
        command = ["bash", "-ec", f'python() {{ printf "%s\\n" "$@"; }}; . {shlex.quote(str(script))}']
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "7"}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        parts.append(part_of(output.splitlines()[1:]))
    assert parts == [(number, len(parts)) for number in range(len(parts))]


def test_the_pods_of_the_indexed_job_are_the_parts_of_a_study() -> None:
    job = yaml.safe_load(study_snippet("yaml"))
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["maxFailedIndexes"] <= spec["completions"], "required with backoffLimitPerIndex"
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    [variable] = container["env"]
    assert "batch.kubernetes.io/job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    placeholder = f"$({variable['name']})"
    command = [*container["command"][2:], *container["args"]]
    parts = [part_of([a.replace(placeholder, str(i)) for a in command]) for i in range(spec["completions"])]
    assert parts == [(number, len(parts)) for number in range(len(parts))]
