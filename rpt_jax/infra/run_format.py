"""The format number and package version in the files of a run, the check that refuses others, and names in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from rpt_jax import __version__
from rpt_jax.errors import UserError

# Increase it when config fields are renamed or the contents of a checkpoint change. Format 1 wrote no number, and the config of a
# run as config.json.
FORMAT = 5
# In the directory of a run.
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
POLICY = "policy"
MODEL_CONFIG_FILE = "config.json"  # Of a policy; a directory with it is taken for a complete one.
RESULT = "result.json"
STUDY_RESULTS = "results.json"  # In the directory of a study.


def format_stamp() -> dict[str, Any]:
    """Return the entries that every file of a run begins with."""
    return {"format": FORMAT, "version": __version__}


def check_format(values: Mapping[str, Any], path: PurePath) -> None:
    """Check that `values`, read from `path`, were written in the current format.

    Raises:
      UserError: they were not; the message says what to do.
    """
    found = values.get("format", 1)
    if found == FORMAT:
        return
    writer = f"rpt_jax {values['version']}" if "version" in values else "an older rpt_jax"
    raise UserError(
        f"{path} has format {found} (written by {writer}), but rpt_jax {__version__} reads format {FORMAT} only. Choose another "
        "--workdir to start a new run, or finish this one with the version that wrote it.",
        field="--workdir",
    )
