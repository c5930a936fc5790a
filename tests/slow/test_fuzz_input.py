"""Fuzz tests of configs and run files: malformed input gives a valid result or a UserError, never another exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.config import Experiment, default_config, from_config_dict
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.workdir import RUN_CONFIG, claimed_workdir
from tests.helpers.fuzzing import altered, many, values

pytestmark = pytest.mark.slow
# The name of any config field.
names = st.sampled_from([name for name, _ in leaves(Experiment())])


@many
@given(st.dictionaries(names | st.text(max_size=20), values, max_size=4))
def test_any_config(changes: dict[str, object]) -> None:
    config = default_config().to_dict()
    for name, value in changes.items():
        section, _, leaf = name.rpartition(".")
        parent = config.get(section, config) if section else config
        (parent if isinstance(parent, dict) else config)[leaf] = value
    try:
        experiment = from_config_dict(config)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(experiment, Experiment)


@many
@given(st.text(max_size=60) | st.builds(lambda n, s, v: f"{n}{s}{v}", names, st.sampled_from(["=", "", " = "]), values))
def test_any_command_line(assignment: str) -> None:
    try:
        from_config_dict({}, [assignment])
    except UserError as error:
        assert str(error)


LINES = b"".join(json.dumps({"step": step, "loss/a": 0.5 * step}).encode() + b"\n" for step in range(4))


@many
@given(altered(LINES) | st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_malformed_metrics_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    try:
        lines = read_metrics(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


SAVED = json.dumps(dict(leaves(Experiment()))).encode()


@many
@given(altered(SAVED) | values.map(lambda value: json.dumps(value).encode()))
def test_malformed_configs_of_workdirs(tmp_path: Path, data: bytes) -> None:
    (tmp_path / RUN_CONFIG).write_bytes(data)
    try:
        with claimed_workdir(tmp_path, Experiment()):
            pass
    except UserError as error:
        assert str(tmp_path) in str(error)
