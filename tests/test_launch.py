"""The scripts that make an environment and run something in it: launch/local.sh, launch/test.sh and .ci/run.

Most tests use stand-ins for Python, pip and df (see tests/helpers/launchers.py): they cover the logic of the scripts, and nothing
is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launchers import Clone
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

stand_in = pytest.mark.stand_in


@pytest.fixture
def clone_without_python(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def clone(clone_without_python: Clone) -> Clone:
    clone_without_python.add_python("python3")
    return clone_without_python


def assert_refused(result: tuple[int, list[str], str], *fragments: str) -> None:
    code, stdout, stderr = result
    assert code == 1
    assert not stdout
    complaints = [line for line in stderr.splitlines() if not line.startswith("launch: installing requirements.txt")]
    assert len(complaints) == 1, stderr
    for fragment in fragments:
        assert fragment in complaints[0]


@pytest.mark.parametrize("script", [".ci/run", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("launch/*.sh"))])
def test_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@stand_in
def test_local_passes_on_arguments_directory_and_exit_code(clone: Clone, tmp_path: Path) -> None:
    arguments = ["--config=my config.py", "--workdir=out", "--config.seed=3", ""]
    for _ in range(2):
        code, lines, _ = clone.run("launch/local.sh", *arguments, cwd=tmp_path)
        assert code == 7
        assert lines == [str(tmp_path), str(clone.root), "-m", "rpt_jax.main", *arguments]
    assert len(clone.pip_calls()) == 1, "the second launch must not install again"


@stand_in
def test_tests_run_in_the_repository_root(clone: Clone, tmp_path: Path) -> None:
    code, lines, _ = clone.run("launch/test.sh", "-m", "slow", cwd=tmp_path)
    assert code == 7
    assert lines == [str(clone.root), "", "-m", "pytest", "-m", "slow"]


@stand_in
def test_changed_requirements_are_installed_into_the_same_environment(clone: Clone) -> None:
    clone.run("launch/local.sh")
    (clone.venv / "added by the user").touch()
    (clone.root / "requirements.txt").write_text("jax\nflax\n")
    assert clone.run("launch/local.sh")[0] == 7
    assert len(clone.pip_calls()) == 2
    assert (clone.venv / "added by the user").exists()


@stand_in
def test_test_requirements_are_installed_by_tests_only(clone: Clone) -> None:
    """They are added to those of a run; a later run neither requires nor removes them."""

    def files_of_last_call() -> list[bool]:
        last = clone.pip_calls()[-1]
        return [f"clone/{name}" in last for name in ("requirements.txt", "tests/requirements.txt")]

    clone.run("launch/local.sh")
    assert files_of_last_call() == [True, False]
    for _ in range(2):
        clone.run("launch/test.sh")
        clone.run("launch/local.sh")
        assert len(clone.pip_calls()) == 2
        assert files_of_last_call() == [True, True]

    (clone.root / "tests" / "requirements.txt").write_text("torch\ntransformers\n")
    clone.run("launch/local.sh")
    assert len(clone.pip_calls()) == 2
    clone.run("launch/test.sh")
    assert len(clone.pip_calls()) == 3


@stand_in
def test_interrupted_installation_starts_over(clone: Clone) -> None:
    code, _, _ = clone.run("launch/local.sh", PIP_DOES="kill -9 0")
    assert code == -9
    (clone.venv / "half a package").touch()
    assert clone.run("launch/local.sh")[0] == 7
    assert len(clone.pip_calls()) == 2
    assert not (clone.venv / "half a package").exists()


@stand_in
def test_interrupted_update_is_repeated(clone: Clone) -> None:
    clone.run("launch/local.sh")
    (clone.root / "requirements.txt").write_text("jax\nflax\n")
    clone.run("launch/local.sh", PIP_DOES="kill -9 0")
    assert clone.run("launch/local.sh")[0] == 7
    assert len(clone.pip_calls()) == 3


@stand_in
def test_environment_without_its_interpreter_is_rebuilt(clone: Clone) -> None:
    clone.run("launch/local.sh")
    (clone.venv / "bin" / "python").unlink()
    assert clone.run("launch/local.sh")[0] == 7
    assert len(clone.pip_calls()) == 2


@stand_in
def test_activated_environment_is_not_rebuilt_with_its_own_interpreter(clone: Clone) -> None:
    clone.run("launch/local.sh", PIP_DOES="exit 1")
    shutil.copy(clone.venv / "bin" / "python", clone.venv / "bin" / "python3.13")
    path = f"{clone.venv}/bin:{clone.bin}"
    assert clone.run("launch/local.sh", PATH=path)[0] == 7


@stand_in
@pytest.mark.skipif(not shutil.which("flock"), reason="without flock, launches do not wait for each other")
def test_simultaneous_launches_install_once(clone: Clone) -> None:
    started = [clone.start("launch/local.sh", PIP_DOES="sleep 0.5") for _ in range(2)]
    for process in started:
        process.communicate(timeout=CHILD_SECONDS)
    assert [process.returncode for process in started] == [7, 7]
    assert len(clone.pip_calls()) == 1


@stand_in
def test_environment_can_live_elsewhere(clone: Clone, tmp_path: Path) -> None:
    assert clone.run("launch/test.sh", cwd=tmp_path, RPT_VENV="other place/env/")[0] == 7
    assert (tmp_path / "other place" / "env" / "requirements.stamp").exists()
    assert not clone.venv.exists()


@stand_in
def test_directory_with_other_files_is_refused_and_kept(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert_refused(clone.run("launch/local.sh", RPT_VENV=str(tmp_path)), f"{tmp_path} is not a virtual environment")
    assert (tmp_path / "thesis.tex").exists()


@stand_in
def test_missing_python_is_reported(clone_without_python: Clone) -> None:
    assert_refused(clone_without_python.run("launch/local.sh"), "no Python found", "install Python 3.11 or newer")
    result = clone_without_python.run("launch/local.sh", PYTHON="/no/python")
    assert_refused(result, "no Python found as /no/python")


@stand_in
def test_old_python_is_refused_where_there_is_no_newer_one(clone_without_python: Clone) -> None:
    clone = clone_without_python
    clone.add_python("python3", "3, 9")
    assert_refused(clone.run("launch/local.sh"), f"{clone.bin}/python3 is Python 3.9: install Python 3.11 or newer")
    assert not clone.venv.exists()
    clone.add_python("python", "3, 11")
    assert clone.run("launch/local.sh")[0] == 7
    assert (clone.venv / "requirements.stamp").read_text().startswith("python3.11 ")


@stand_in
def test_a_python_that_is_not_released_is_passed_over(clone_without_python: Clone) -> None:
    clone = clone_without_python
    clone.add_python("python3.11", "3, 11", level="candidate")
    assert_refused(clone.run("launch/local.sh"), f"{clone.bin}/python3.11 is Python 3.11 (pre-release)")
    clone.add_python("python3", "3, 12")
    assert clone.run("launch/local.sh")[0] == 7
    assert (clone.venv / "requirements.stamp").read_text().startswith("python3.12 ")


@stand_in
def test_full_disk_is_reported_before_the_installation(clone: Clone) -> None:
    clone.add_tool(
        "df",
        f"#!{shutil.which('bash')}\n"
        "echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'\n"
        "echo '/dev/my disk 41943040 40919040 1024000 98% /mnt/my disk'\n",
    )
    assert_refused(clone.run("launch/local.sh"), f"{clone.root} has 1000 MB of free disk space", "about 1600 MB")
    assert not clone.venv.exists()
    assert not clone.pip_calls()


# What a failed installation is explained by: (the decisive lines of pip's output, a fragment of the explanation). The lines were
# copied from failures of pip 23.2 and 26.3.
FAILURES = [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
    (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by NameResolutionError\n"
        "ERROR: No matching distribution found for jax",
        "index cannot be reached; check the network",
    ),
    (
        "error: [Errno 2] No such file or directory: gcc\nERROR: Failed building wheel for pycosat",
        "install a C compiler",
    ),
    (
        "ERROR: ResolutionImpossible: for help visit the manual",
        "no versions of the packages satisfy requirements.txt",
    ),
    (
        "ERROR: No matching distribution found for jax",
        "failed: ERROR: No matching distribution found for jax.",
    ),
]


@stand_in
@pytest.mark.parametrize(
    ("output", "explanation"), FAILURES, ids=["disk", "network", "compiler", "conflict", "anything else"]
)
def test_failed_installation_is_explained_and_repeated(clone: Clone, output: str, explanation: str) -> None:
    result = clone.run("launch/local.sh", PIP_DOES=f"echo '{output}'; exit 1")
    assert_refused(result, "installing the packages failed", explanation, str(clone.venv / "setup.log"))
    assert output in (clone.venv / "setup.log").read_text()
    assert clone.run("launch/local.sh")[0] == 7
    assert len(clone.pip_calls()) == 2


@stand_in
def test_missing_ensurepip_is_explained(clone: Clone) -> None:
    says = "The virtual environment was not created successfully because ensurepip is not available."
    result = clone.run("launch/local.sh", VENV_SAYS=says)
    assert_refused(result, f"with {clone.bin}/python3 failed: it lacks ensurepip", "apt install python3-venv")


@stand_in
def test_installed_jax_for_an_accelerator_is_kept(clone: Clone, tmp_path: Path) -> None:
    packages = tmp_path / "gpu" / "site-packages"
    for name in ("jax", "jaxlib"):
        (packages / name).mkdir(parents=True)
        (packages / f"{name}-0.11.2.dist-info").mkdir()
        (packages / f"{name}-0.11.2.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 0.11.2\n")
    clone.add_python("python3.13", "3, 13", packages)
    assert "accelerator's" not in clone.run("launch/local.sh")[2], "JAX without a plugin is a JAX for the CPU"
    assert (clone.venv / "requirements.stamp").read_text().startswith("python3.13 "), "the first of equal rank"

    shutil.rmtree(clone.venv)
    (packages / "jax_plugins").mkdir()
    clone.add_python("python3.13", "3, 13")
    clone.add_python("python", "3, 12", packages)
    code, _, stderr = clone.run("launch/local.sh")
    assert code == 7
    assert f"using the accelerator's JAX of {clone.bin}/python\n" in stderr
    shown = clone.venv / "lib" / "python3.99" / "site-packages" / "accelerator.pth"
    assert shown.read_text().splitlines() == [str(packages)]
    assert (clone.venv / "constraints.txt").read_text() == "jax==0.11.2\njaxlib==0.11.2\n"
    assert clone.pip_calls()[-1].endswith(f"-c {clone.venv}/constraints.txt")


# --- .ci/run ---

CHECKS = {  # The command that each check runs: a stand-in for it is put on PATH.
    "lint": "ruff",
    "format": "ruff",
    "types": "basedpyright",
    "layers": "lint-imports",
    "shell": "shellcheck",
    "dependencies": "deptry",
}


def add_checks(clone: Clone, failing: str = "") -> None:
    for tool in set(CHECKS.values()):
        clone.add_tool(tool, f"#!{shutil.which('bash')}\nexit {int(tool == failing)}\n")


@stand_in
def test_ci_runs_the_tests_last_and_with_its_arguments(clone: Clone, tmp_path: Path) -> None:
    add_checks(clone)
    code, lines, _ = clone.run(".ci/run", "-m", "slow", cwd=tmp_path)
    assert code == 7
    assert lines[-6:] == [str(clone.root), "", "-m", "pytest", "-m", "slow"]
    banners = [line.removeprefix("=== ") for line in lines if line.startswith("=== ") and ":" not in line]
    assert banners == ["lint", "format", "types", "layers", "shell", "docs", "dependencies", "tests"]
    for name in CHECKS:
        assert any(line.startswith(f"=== {name}: passed in ") for line in lines)


@stand_in
@pytest.mark.parametrize("name", ["types", "layers", "shell", "dependencies"])
def test_ci_fails_with_a_check_but_runs_the_others_and_the_tests(clone: Clone, name: str) -> None:
    add_checks(clone, failing=CHECKS[name])
    # mkdocs and pytest run as modules of the stand-in interpreter: let them succeed.
    interpreter = clone.bin / "python3"
    interpreter.write_text(interpreter.read_text().replace("exit 7", "exit 0"))
    code, lines, _ = clone.run(".ci/run")
    assert code == 1
    assert f"=== failed: {name}" in lines
    assert sum(": passed in " in line for line in lines) == len(CHECKS)
    assert lines[-2:] == ["-m", "pytest"]


@stand_in
def test_ci_runs_single_checks_without_tests(clone: Clone) -> None:
    add_checks(clone, failing="deptry")
    code, lines, _ = clone.run(".ci/run", "--checks", "lint", "shell")
    assert code == 0
    assert [line for line in lines if line.endswith(("lint", "shell"))] == ["=== lint", "=== shell"]
    assert "pytest" not in lines
    assert clone.run(".ci/run", "--checks", "dependencies")[0] == 1
    code, _, stderr = clone.run(".ci/run", "--checks", "spelling")
    assert code == 1
    assert "'spelling' is not one of: lint format types layers shell docs dependencies" in stderr


# --- pytest's settings ---


@pytest.mark.parametrize(("arguments", "passed"), [((), "fast"), (("-m", "slow"), "slow")])
def test_slow_tests_run_only_on_request(tmp_path: Path, arguments: tuple[str, ...], passed: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_speed.py").write_text(
        "import pytest\n\n\ndef test_fast():\n    pass\n\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"test_{passed} PASSED" in result.stdout
    assert "1 passed, 1 deselected" in result.stdout
