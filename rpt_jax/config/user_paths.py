"""The home directory in paths: in `--config.data.path=~/texts`, the shell does not expand the tilde."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from rpt_jax.config.schema import Experiment

# A tilde at the beginning of a path: of the whole text, or of a part of the mixture in `data.path`.
_HOME = re.compile(r"(^|,\s*|(?:^|,\s*)[\d.]+=)(~[^/,]*)")


def user_path(text: str) -> Path:
    """Return a path of a command line, with `~` expanded."""
    return Path(text).expanduser()


def expand_home(text: str) -> str:
    """Expand `~` at the beginning of a path, and of every path of a list with or without weights ("0.7=~/a,0.3=~/b")."""
    return _HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), text)


def with_expanded_paths(experiment: Experiment) -> Experiment:
    """Return the experiment with `~` expanded in all of its fields that hold paths."""
    data = experiment.data
    return dataclasses.replace(
        experiment,
        policy=dataclasses.replace(experiment.policy, path=expand_home(experiment.policy.path)),
        data=dataclasses.replace(data, path=expand_home(data.path), prepared=expand_home(data.prepared)),
        prompt=dataclasses.replace(experiment.prompt, template=expand_home(experiment.prompt.template)),
        pretrain=dataclasses.replace(experiment.pretrain, export=expand_home(experiment.pretrain.export)),
    )
