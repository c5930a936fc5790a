"""A copy of the launchers in which stand-ins take the place of Python, pip and the tools of clusters. Nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS

SCRIPTS = (".ci/run", "launch/local.sh", "launch/setup.sh", "launch/test.sh")
TOOLS = ("bash", "cat", "cp", "df", "dirname", "flock", "head", "mkdir", "mktemp", "rm", "rmdir", "sed", "sleep")
REQUIREMENTS = {
    "requirements.txt": "jax\n",
    "tests/requirements.txt": "torch\n",
    "requirements/dev.txt": "ruff\n",
    "requirements/docs.txt": "mkdocs\n",
}

# Runs `-c` with the real interpreter, which claims the given version and packages. Imitates venv and pip. For any other module,
# prints the working directory, PYTHONPATH and the arguments, and exits with code 7.
PYTHON = """#!{bash}
[ "$1" != -P ] || shift
[ "$1" != -c ] || exec "{real}" -I -S -c 'import sys
sys.version_info = ({version}, 0, "{level}", 0)
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
    """A copy of the launchers in a directory whose path has spaces, with a PATH of stand-ins and a few real tools.

    Attributes:
      root: the copy of the repository root.
      bin: the only directory on PATH.
      venv: where the launchers make their environment by default.
      calls: the file to which stand-ins append their arguments, a line for each call.
    """

    def __init__(self, path: Path, scripts: Iterable[str] = (), tools: Iterable[str] = ()) -> None:
        """
        Args:
          path: an empty directory.
          scripts: scripts to copy in addition to SCRIPTS, relative to the repository root.
          tools: real tools to put on PATH in addition to TOOLS.
        """
        self.root = path / "a clone"
        self.bin = path / "some bin"
        self.venv = self.root / ".venv"
        self.calls = path / "calls of stand-ins"
        for script in (*SCRIPTS, *scripts):
            (self.root / script).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / script, self.root / script)
        for name, text in REQUIREMENTS.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        self.bin.mkdir()
        for tool in (*TOOLS, *tools):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def add_python(self, name: str, version: str = "3, 12", packages: Path | str = "", level: str = "final") -> None:
        """Put a stand-in for an interpreter on PATH.

        Args:
          name: the name of the command, such as "python3".
          version: the version that it claims to be, as "major, minor".
          packages: a directory that it imports packages from.
          level: the release level that it claims, such as "candidate".
        """
        text = PYTHON.format(
            bash=shutil.which("bash"),
            real=sys.executable,
            version=version,
            level=level,
            packages=packages,
            calls=self.calls,
        )
        self.add_tool(name, text)

    def add_tool(self, name: str, text: str) -> None:
        """Put an executable script with the given text on PATH, in place of any other of that name."""
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a script of the clone, with `environment` in addition to PATH and HOME."""
        return subprocess.Popen(
            ["bash", self.root / script, *arguments],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "HOME": str(self.root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> tuple[int, list[str], str]:
        """Run a script of the clone. Returns: the exit code, the lines of stdout, and stderr."""
        process = self.start(script, *arguments, cwd=cwd, **environment)
        stdout, stderr = process.communicate(timeout=CHILD_SECONDS)
        return process.returncode, stdout.splitlines(), stderr

    def pip_calls(self) -> list[str]:
        """Return the arguments of every call of pip."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []


def wait_until(condition: Callable[[], bool], awaited: str, seconds: float = 600) -> None:
    """Wait until `condition()`. Raises: TimeoutError, with what was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(awaited)
        time.sleep(0.05)


def wait_for_text(path: Path, text: str) -> None:
    """Wait until the file `path` contains `text`. Raises: TimeoutError."""
    wait_until(lambda: path.exists() and text in path.read_text(), f"{text!r} in {path}")
