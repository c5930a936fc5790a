"""Topologies: parsing `--topology`, and the environment for compiling without the chips."""

from __future__ import annotations

import importlib.util
import os

import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra.chips import CHIPS
from rpt_jax.preflight.topology import parse_topology, prepare_process


@pytest.mark.parametrize(
    ("text", "kind", "chips"),
    [("v5p:4x4x4", "v5p", 64), ("v6e:8x8", "v6e", 64), ("v4:2x2x2", "v4", 8), ("h100:8", "h100", 8)],
)
def test_a_topology_has_a_kind_and_a_number_of_chips(text: str, kind: str, chips: int):
    topology = parse_topology(text)
    assert (topology.kind, topology.chips, topology.name) == (kind, chips, text)
    assert topology.has_compiler == (CHIPS[kind].platform == "tpu")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("v6e-1", "v6e:1x1"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-64", "v6e:8x8"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-256", "v5e:16x16"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-256", "v5p:4x4x8"),
        ("v5p-8192", "v5p:16x16x16"),
        ("v4-32", "v4:2x2x4"),
    ],
)
def test_an_accelerator_type_of_cloud_tpu_names_a_topology(text: str, name: str):
    assert parse_topology(text).name == name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("v5q:4x4x4", "Did you mean 'v5"),
        ("v5p", "v5p:2x2x4"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("h100:2x4", "h100:8"),
        ("v6e:0x4", "v6e:4x4"),
        ("v6e-48", "v6e:4x4"),
        ("v6e-2", "v6e:4x4"),
        ("v6e-512", "v6e:4x4"),
        ("v5p-4", "v5p:2x2x4"),
        ("v5p-129", "v5p:2x2x4"),
        ("v6-64", "Did you mean 'v6e'"),
        ("h100-8", "h100:8"),
    ],
)
def test_an_invalid_topology_is_refused_with_a_valid_example(text: str, hint: str):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert error.value.field == "--topology"
    assert text in str(error.value) and hint in str(error.value)


def test_a_missing_libtpu_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]') as error:
        prepare_process(parse_topology("v5e:2x2"))
    assert error.value.field == "--topology"


def test_gpus_are_replaced_by_simulated_cpu_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    prepare_process(parse_topology("h100:8"))
    assert os.environ["XLA_FLAGS"] == "--xla_of_the_user=1 --xla_force_host_platform_device_count=8"
