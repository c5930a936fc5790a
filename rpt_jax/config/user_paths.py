"""Paths that a user gives in a config or on a command line.

`~` is expanded here, because in `--config.data.path=~/texts` the shell does not do it. `infra.storage` opens URLs; where a path
must be local, they are refused: "gs://bucket/run" would become a folder called "gs:" on the local disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path

from rpt_jax.config.schema import Experiment
from rpt_jax.errors import UserError

# Config fields that name a file or a directory.
PATH_FIELDS = (
    "policy.path",
    "data.path",
    "data.prepared",
    "questions.path",
    "questions.test_path",
    "questions.pass_rates",
    "prompt.template",
    "pretrain.export",
)

# A tilde at the beginning of a path: of the whole text, or of a part of the mixture in `data.path`.
_HOME = re.compile(r"(^|,\s*|(?:^|,\s*)[\d.]+=)(~[^/,]*)")
# "gs://bucket/run", and "gs:/bucket/run", which `Path` makes of it; also after a weight or a comma, as in data.path.
_ANY_URL = re.compile(r"(?:^|[=,])\s*(?P<scheme>[a-z][a-z0-9+.-]+):/", re.IGNORECASE)
# A URL in the value of a path field.
URL = re.compile(r"(?P<before>^|[=,]\s*)(?P<url>[a-z][a-z0-9+.-]+://[^,]+)", re.IGNORECASE)
_NOT_STORAGE = ("file", "http", "https")
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
# The command that copies from and to what URLs of a scheme name.
_COPY = {
    "gs": "gcloud storage cp -r",
    "s3": "aws s3 cp --recursive",
    "hf": "hf download",
    "http": "curl -O",
    "https": "curl -O",
}


def cache_directory(name: str) -> Path | None:
    """Return the directory `name` of rpt_jax in the user's cache directory, or None if the user has no home."""
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "rpt_jax" / name
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "rpt_jax" / name
    return None


def user_path(text: str) -> Path:
    """Return a path of a command line, with `~` expanded; unchanged if it names an unknown user, as in a shell."""
    return Path(os.path.expanduser(text))


def expand_home(text: str) -> str:
    """Expand `~` at the beginning of a path, and of every path of a list with or without weights ("0.7=~/a,0.3=~/b")."""
    return _HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), text)


def with_expanded_paths(experiment: Experiment) -> Experiment:
    """Return the experiment with `~` expanded in `PATH_FIELDS`."""
    for name in PATH_FIELDS:
        section_name, _, field = name.partition(".")
        section = getattr(experiment, section_name)
        section = dataclasses.replace(section, **{field: expand_home(getattr(section, field))})
        experiment = dataclasses.replace(experiment, **{section_name: section})
    return experiment


def is_url(text: str | None) -> bool:
    """Return whether a path, or one of its comma-separated parts, is a URL such as gs://bucket/run."""
    return bool(URL.search(text or ""))


def check_location(name: str, location: str | None) -> None:
    """Check that `location` is a path or a well-formed URL of object storage. Whether it can be used is known when it is opened.

    Args:
      name: the config field or flag that has this value.
      location: its value; None if it is not set.

    Raises: UserError.
    """
    text = location or ""
    if _PASSWORD.search(text):
        raise UserError(
            f"{name} is a URL with a password, which would be printed and stored: give it without, and the credentials as "
            "docs/guides/object-storage.md says.",
            field=name,
        )
    for match in _ANY_URL.finditer(text):
        rest = text[match.end() :]
        scheme = match["scheme"].lower()
        if scheme in _NOT_STORAGE:
            check_local_path(name, location)
        if not re.match(r"/[^/,]", rest):
            raise UserError(
                f"{name}={text} is not a URL of object storage: it must be like {scheme}://BUCKET/PATH.", field=name
            )


def check_folder(name: str, file: Path | None) -> None:
    """Check that a file can be written to its folder, before the work that it is to be the result of.

    Args:
      name: the flag that has this value.
      file: its value; None if it is not set.

    Raises: UserError, if there is no such folder or the file is one.
    """
    if file and not file.parent.is_dir():
        raise UserError(f"{name}={file}: the folder {file.parent} does not exist.", field=name)
    if file and file.is_dir():
        raise UserError(f"{name}={file} is a folder: give the name of a file.", field=name)


def check_local_path(name: str, path: str | Path | None) -> None:
    """Check that `path` is not a URL.

    Args:
      name: the config field or flag that has this value.
      path: its value; None if it is not set.

    Raises:
      UserError: it is a URL, or has one among its comma-separated parts.
    """
    text = str(path or "")
    url = _ANY_URL.search(text)
    if not url:
        return
    if isinstance(path, Path):
        text = text.replace(":/", "://", 1)
    command = _COPY.get("hf" if "huggingface.co/" in text else url["scheme"].lower())
    example = f", for example with `{command}`" if command else ""
    raise UserError(
        f"{name}={text} is a URL, which is not supported. Give a path of this machine: copy to or from the URL{example}, or "
        "mount it as a directory.",
        field=name,
    )
