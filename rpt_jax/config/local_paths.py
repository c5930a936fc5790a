"""Paths must be directories and files of this machine: a URL would become a folder called "gs:" on the local disk."""

from __future__ import annotations

import re
from pathlib import Path

from rpt_jax.errors import UserError

# "gs://bucket/run", and "gs:/bucket/run", which `Path` makes of it; also behind a weight or a comma, as in data.path.
_URL = re.compile(r"(?:^|[=,])\s*(?P<scheme>[a-z][a-z0-9+.-]+):/", re.IGNORECASE)
# The command that copies from and to what URLs of a scheme name.
_COPY = {
    "gs": "gcloud storage cp -r",
    "s3": "aws s3 cp --recursive",
    "hf": "hf download",
    "http": "curl -O",
    "https": "curl -O",
}


def check_local_path(name: str, path: str | Path | None) -> None:
    """Check that `path` is not a URL.

    Args:
      name: the config field or flag that has this value.
      path: its value; None if it is not set.

    Raises:
      UserError: it is a URL, or has one among its comma-separated parts.
    """
    url = _URL.search(str(path or ""))
    if not url:
        return
    command = _COPY.get(url["scheme"].lower())
    example = f", for example with `{command}`" if command else ""
    raise UserError(
        f"{name}={path} is a URL, which is not supported. Give a path of this machine: copy to or from the URL{example}, or "
        "mount it as a directory.",
        field=name,
    )
