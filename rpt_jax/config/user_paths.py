"""The home directory in paths: in `--config.data.path=~/texts`, the shell does not expand the tilde."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from rpt_jax.config.schema import Experiment

# Config fields that name a file or a directory.
PATH_FIELDS = ("policy.path", "data.path", "data.prepared", "prompt.template", "pretrain.export")

# A tilde at the beginning of a path: of the whole text, or of a part of the mixture in `data.path`.
_HOME = re.compile(r"(^|,\s*|(?:^|,\s*)[\d.]+=)(~[^/,]*)")


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
