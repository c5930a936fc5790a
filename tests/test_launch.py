"""The launchers, run on stand-ins for Python, pip and df: nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SCRIPTS = [".ci/run", "launch/local.sh", "launch/setup.sh", "launch/test.sh"]
TOOLS = ["bash", "cat", "cp", "df", "dirname", "flock", "head", "mkdir", "rm", "rmdir", "sed", "sleep"]

# Runs `-c` for real, with the version and the packages that it claims, and plays venv, pip and every other module.
PYTHON = """#!{bash}
[ "$1" != -P ] || shift
[ "$1" != -c ] || exec "{real}" -I -S -c 'import sys
sys.version_info = ({version}, 0)
sys.path.append("{packages}")
sys.modules["pip"] = sys
exec(sys.argv.pop(1))' "${{@:2}}"
case $2 in
    venv)
        [ -z "$VENV_SAYS" ] || {{ echo "$VENV_SAYS"; exit 1; }}
        mkdir -p "$4/bin" "$4/lib/python3.99/site-packages"
        cp "$0" "$4/bin/python"
        ;;
    pip)
        echo "$*" >>"{calls}"
        eval "$PIP_DOES"
        ;;
    *)
        printf '%s\\n' "$PWD" "$PYTHONPATH" "$@"
        exit 7
        ;;
esac
"""


class Clone:
    """A copy of the launchers under a path with spaces, and a PATH that holds nothing but stand-ins and TOOLS."""

    def __init__(self, path: Path) -> None:
        self.root = path / "a clone"
        self.bin = path / "some bin"
        self.venv = self.root / ".venv"
        self.calls = path / "calls of pip"
        for script in SCRIPTS:
            (self.root / script).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / script, self.root / script)
        (self.root / "requirements.txt").write_text("jax\n")
        (self.root / "tests").mkdir()
        (self.root / "tests" / "requirements.txt").write_text("torch\n")
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def add_python(self, name: str, version: str = "3, 12", packages: Path | str = "") -> None:
        text = PYTHON.format(
            bash=shutil.which("bash"), real=sys.executable, version=version, packages=packages, calls=self.calls
        )
        self.add_tool(name, text)

    def add_tool(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.root / script, *arguments],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "HOME": str(self.root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **kwargs) -> tuple[int, list[str], str]:
        """Returns the exit code, the lines of stdout, and stderr."""
        process = self.start(script, *arguments, **kwargs)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout.splitlines(), stderr

    def installs(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def bare(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def clone(bare: Clone) -> Clone:
    bare.add_python("python3")
    return bare


def assert_refused(result: tuple[int, list[str], str], *fragments: str) -> None:
    code, stdout, stderr = result
    assert code == 1 and not stdout
    complaints = [line for line in stderr.splitlines() if not line.startswith("launch: installing requirements.txt")]
    assert len(complaints) == 1, stderr
    for fragment in fragments:
        assert fragment in complaints[0]


@pytest.mark.parametrize("script", [".ci/run", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("launch/*.sh"))])
def test_script_is_well_formed(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-P", ROOT, ROOT / script], check=True, cwd=ROOT)


def test_local_passes_arguments_directory_and_exit_code_and_installs_once(clone: Clone, tmp_path: Path) -> None:
    arguments = ["--config=my config.py", "--workdir=out", "--config.seed=3", ""]
    for _ in range(2):
        code, lines, _ = clone.run("launch/local.sh", *arguments, cwd=tmp_path)
        assert code == 7
        assert lines == [str(tmp_path), str(clone.root), "-m", "rpt_jax.main", *arguments]
    assert clone.installs() == 1


def test_a_config_of_the_repository_is_found_from_anywhere(clone: Clone, tmp_path: Path) -> None:
    def config_seen_by_main() -> str:
        return clone.run("launch/local.sh", "--config=configs/tiny.py", cwd=tmp_path)[1][-1]

    assert config_seen_by_main() == f"--config={clone.root}/configs/tiny.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").touch()
    assert config_seen_by_main() == "--config=configs/tiny.py"


@pytest.mark.parametrize("script", ["launch/test.sh", ".ci/run"])
def test_tests_run_in_the_repository(clone: Clone, tmp_path: Path, script: str) -> None:
    code, lines, _ = clone.run(script, "-m", "slow", cwd=tmp_path)
    assert code == 7
    assert lines == [str(clone.root), "", "-m", "pytest", "-m", "slow"]


def test_changed_requirements_are_installed_into_the_same_environment(clone: Clone) -> None:
    clone.run("launch/local.sh")
    (clone.venv / "added by the user").touch()
    (clone.root / "requirements.txt").write_text("jax\nflax\n")
    assert clone.run("launch/local.sh")[0] == 7
    assert clone.installs() == 2
    assert (clone.venv / "added by the user").exists()


def test_only_tests_need_the_requirements_of_tests(clone: Clone) -> None:
    """They come on top of what a run needs, and a run neither misses nor removes them."""

    def installed() -> list[bool]:
        return [
            f"{name}requirements.txt" in clone.calls.read_text().splitlines()[-1] for name in ("clone/", "clone/tests/")
        ]

    clone.run("launch/local.sh")
    assert installed() == [True, False]
    for _ in range(2):
        clone.run("launch/test.sh")
        clone.run("launch/local.sh")
        assert clone.installs() == 2 and installed() == [True, True]
    (clone.root / "tests" / "requirements.txt").write_text("torch\ntransformers\n")
    clone.run("launch/local.sh")
    assert clone.installs() == 2
    clone.run("launch/test.sh")
    assert clone.installs() == 3


def test_interrupted_installation_is_made_anew(clone: Clone) -> None:
    code, _, _ = clone.run("launch/local.sh", PIP_DOES="kill -9 0")
    assert code == -9
    (clone.venv / "half a package").touch()
    assert clone.run("launch/local.sh")[0] == 7
    assert clone.installs() == 2
    assert not (clone.venv / "half a package").exists()


def test_interrupted_update_is_repeated(clone: Clone) -> None:
    clone.run("launch/local.sh")
    (clone.root / "requirements.txt").write_text("jax\nflax\n")
    clone.run("launch/local.sh", PIP_DOES="kill -9 0")
    assert clone.run("launch/local.sh")[0] == 7
    assert clone.installs() == 3


def test_environment_whose_python_is_gone_is_made_anew(clone: Clone) -> None:
    clone.run("launch/local.sh")
    (clone.venv / "bin" / "python").unlink()
    assert clone.run("launch/local.sh")[0] == 7
    assert clone.installs() == 2


def test_active_environment_is_not_made_from_itself(clone: Clone) -> None:
    clone.run("launch/local.sh", PIP_DOES="exit 1")
    shutil.copy(clone.venv / "bin" / "python", clone.venv / "bin" / "python3.13")
    path = f"{clone.venv}/bin:{clone.bin}"
    assert clone.run("launch/local.sh", PATH=path)[0] == 7


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock launches do not wait for each other")
def test_two_launches_install_once(clone: Clone) -> None:
    started = [clone.start("launch/local.sh", PIP_DOES="sleep 0.5") for _ in range(2)]
    for process in started:
        process.communicate(timeout=60)
    assert [process.returncode for process in started] == [7, 7]
    assert clone.installs() == 1


def test_other_place_for_the_environment(clone: Clone, tmp_path: Path) -> None:
    assert clone.run("launch/test.sh", cwd=tmp_path, RPT_VENV="other place/env")[0] == 7
    assert (tmp_path / "other place" / "env" / "requirements.stamp").exists()
    assert not clone.venv.exists()


def test_directory_of_something_else_is_left_alone(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert_refused(clone.run("launch/local.sh", RPT_VENV=str(tmp_path)), f"{tmp_path} is no virtual environment")
    assert (tmp_path / "thesis.tex").exists()


def test_no_python(bare: Clone) -> None:
    assert_refused(bare.run("launch/local.sh"), "no Python found", "install Python 3.11 or newer")
    assert_refused(bare.run("launch/local.sh", PYTHON="/no/python"), "no Python found as /no/python")


def test_old_python(bare: Clone) -> None:
    bare.add_python("python3", "3, 9")
    assert_refused(bare.run("launch/local.sh"), f"{bare.bin}/python3 is Python 3.9: install Python 3.11 or newer")
    assert not bare.venv.exists()
    bare.add_python("python", "3, 11")
    assert bare.run("launch/local.sh")[0] == 7
    assert (bare.venv / "requirements.stamp").read_text().startswith("python3.11 ")


def test_full_disk_is_found_before_the_installation(clone: Clone) -> None:
    clone.add_tool(
        "df",
        f"#!{shutil.which('bash')}\n"
        "echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'\n"
        "echo '/dev/my disk 41943040 40919040 1024000 98% /mnt/my disk'\n",
    )
    assert_refused(clone.run("launch/local.sh"), f"{clone.root} has 1000 MB of free disk space", "about 1500 MB")
    assert not clone.venv.exists() and clone.installs() == 0


# The decisive lines of pip 23.2 and 26.3, each run into the failure.
FAILURES = {
    "the disk is full": "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
    "index cannot be reached; check the network": (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by NameResolutionError\n"
        "ERROR: No matching distribution found for jax"
    ),
    "install a C compiler": "error: [Errno 2] No such file or directory: gcc\nERROR: Failed building wheel for pycosat",
    "no versions of the packages satisfy requirements.txt": "ERROR: ResolutionImpossible: for help visit the manual",
    "failed: ERROR: No matching distribution found for jax.": "ERROR: No matching distribution found for jax",
}


@pytest.mark.parametrize("sentence", FAILURES)
def test_failed_installation_says_why_and_is_not_taken_for_complete(clone: Clone, sentence: str) -> None:
    result = clone.run("launch/local.sh", PIP_DOES=f"echo '{FAILURES[sentence]}'; exit 1")
    assert_refused(result, "installing the packages failed", sentence, str(clone.venv / "setup.log"))
    assert FAILURES[sentence] in (clone.venv / "setup.log").read_text()
    assert clone.run("launch/local.sh")[0] == 7
    assert clone.installs() == 2


def test_python_without_ensurepip(clone: Clone) -> None:
    says = "The virtual environment was not created successfully because ensurepip is not available."
    result = clone.run("launch/local.sh", VENV_SAYS=says)
    assert_refused(result, f"with {clone.bin}/python3 failed: it lacks ensurepip", "apt install python3-venv")


def test_accelerator_jax_is_used_as_it_is(clone: Clone, tmp_path: Path) -> None:
    packages = tmp_path / "gpu" / "site-packages"
    for name in ("jax", "jaxlib"):
        (packages / name).mkdir(parents=True)
        (packages / f"{name}-0.11.2.dist-info").mkdir()
        (packages / f"{name}-0.11.2.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 0.11.2\n")
    clone.add_python("python3.13", "3, 13", packages)
    assert clone.run("launch/local.sh")[2].count("accelerator's") == 0, "JAX without a plugin is a JAX for the CPU"
    assert (clone.venv / "requirements.stamp").read_text().startswith("python3.13 "), "the first of equals"

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
    assert clone.calls.read_text().splitlines()[-1].endswith(f"-c {clone.venv}/constraints.txt")


@pytest.mark.parametrize("arguments, passed", [((), "fast"), (("-m", "slow"), "slow")])
def test_slow_tests_run_only_where_asked_for(tmp_path: Path, arguments: tuple[str, ...], passed: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_speed.py").write_text(
        "import pytest\n\n\ndef test_fast():\n    pass\n\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"test_{passed} PASSED" in result.stdout and "1 passed, 1 deselected" in result.stdout
