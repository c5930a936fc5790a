"""Malformed input of every kind: a right result or a UserError, never another exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpt_jax.config import Experiment, default_config, from_config_dict
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.run_format import format_stamp
from rpt_jax.infra.workdir import RUN_CONFIG, claimed_workdir

many = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
names = st.sampled_from([name for name, _ in leaves(Experiment())])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def altered(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some places overwritten, cut out, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place, size = draw(st.integers(0, len(changed))), draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["write", "cut", "repeat", "end"]))
        if kind == "write":
            changed[place : place + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del changed[place : place + size]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + size] * draw(st.integers(1, 50))
        else:
            del changed[place:]
    return bytes(changed)


@pytest.mark.slow
@many
@given(st.dictionaries(names | st.text(max_size=20), values, max_size=4))
def test_configs(changes: dict[str, object]) -> None:
    config = default_config().to_dict()
    for name, value in changes.items():
        section, _, leaf = name.rpartition(".")
        place = config.get(section, config) if section else config
        (place if isinstance(place, dict) else config)[leaf] = value
    try:
        experiment = from_config_dict(config)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(experiment, Experiment)


@pytest.mark.slow
@many
@given(st.text(max_size=60) | st.builds(lambda n, s, v: f"{n}{s}{v}", names, st.sampled_from(["=", "", " = "]), values))
def test_command_lines(assignment: str) -> None:
    try:
        from_config_dict({}, [assignment])
    except UserError as error:
        assert str(error)


LINES = b"".join(json.dumps({"step": step, "loss/a": 0.5 * step}).encode() + b"\n" for step in range(4))


@pytest.mark.slow
@many
@given(altered(LINES) | st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_metrics_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    try:
        lines = read_metrics(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


SAVED = json.dumps({**format_stamp(), "config": dict(leaves(Experiment()))}).encode()


@pytest.mark.slow
@many
@given(altered(SAVED) | values.map(lambda value: json.dumps(value).encode()))
def test_configs_of_workdirs(tmp_path: Path, data: bytes) -> None:
    (tmp_path / RUN_CONFIG).write_bytes(data)
    try:
        with claimed_workdir(tmp_path, Experiment()):
            pass
    except UserError as error:
        assert str(tmp_path) in str(error)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": 1, "a": 1e999}'])
def test_json_that_a_parser_chokes_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match="not a JSON object of finite numbers"):
        read_metrics(tmp_path / "metrics.jsonl")
