"""The settings for GPUs that command-line tools add to the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax.infra.gpu_settings import exclude_nondeterministic_operations, has_gpu, set_gpu_defaults


@pytest.fixture(autouse=True)
def _cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"]
)
def test_the_memory_that_the_environment_gives_to_jax_stays(name: str) -> None:
    environment = {name: "0.5"}
    set_gpu_defaults(environment)
    del environment["XLA_FLAGS"]
    assert environment == {name: "0.5"}


def test_jax_gets_most_of_the_memory_and_xla_a_directory_for_its_measurements(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    set_gpu_defaults(environment)
    directory = tmp_path / "cache" / "rpt_jax" / "autotuned"
    assert environment == {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        "XLA_FLAGS": f"--xla_gpu_per_fusion_autotune_cache_dir={directory}",
    }
    assert directory.is_dir()


def test_flags_of_the_user_win() -> None:
    flags = "--xla_gpu_per_fusion_autotune_cache_dir= --xla_gpu_exclude_nondeterministic_ops=false"
    environment = {"XLA_FLAGS": flags}
    set_gpu_defaults(environment)
    exclude_nondeterministic_operations(environment)
    assert environment["XLA_FLAGS"] == flags


def test_flags_are_added_to_those_of_the_user() -> None:
    environment = {"XLA_FLAGS": "--xla_gpu_autotune_level=2"}
    exclude_nondeterministic_operations(environment)
    assert environment["XLA_FLAGS"] == "--xla_gpu_autotune_level=2 --xla_gpu_exclude_nondeterministic_ops=true"


def test_a_gpu_is_found_by_its_device_file(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert not has_gpu(tmp_path)
    (tmp_path / "dev" / "nvidia0").touch()
    assert has_gpu(tmp_path)
