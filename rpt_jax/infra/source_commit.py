"""The commit of the source code that runs."""

from __future__ import annotations

import functools
import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def source_commit() -> str | None:
    """Return the git commit of the package, with "+changes" if files differ from it; None if it is unknown.

    The first call decides, at the start of a run: the clone may be at another commit when the run ends.

    The commit is that of the clone which the package is in, or the one that pip installed it from. A repository that merely
    contains a virtual environment with the package does not count.
    """
    top_level = _git("rev-parse", "--show-toplevel")
    if top_level and Path(top_level).resolve() == _PACKAGE.parent:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
        return f"{commit}+changes" if commit and changes else commit
    return _installed_commit()


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the package's directory, None if it fails or git is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """Return the commit that pip recorded when it installed the package from a repository (PEP 610)."""
    try:
        record = distribution("rpt-jax").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
