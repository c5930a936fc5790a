"""The compilation cache: a second process loads programs, and a broken entry does no harm."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from rpt_jax.infra.compilation_cache import ProgramFiles, compilation_cache, default_directory


@pytest.fixture(autouse=True)
def every_program_is_kept() -> Iterator[None]:
    """Turn the cache of the other tests off, and keep programs that compile faster than JAX's limit of a second, too."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    earlier = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, earlier):
        for name, value in values.items():
            jax.config.update(name, value)
        reset_cache()
        if values is settings:
            yield


def run_program() -> int:
    """Run a program that JAX has forgotten; return how often it was found in the cache."""
    hits: list[str] = []

    def count(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    def tripled(x: jax.Array) -> jax.Array:
        return 3 * x

    jax.monitoring.register_event_listener(count)
    jax.clear_caches()
    assert jax.jit(tripled)(jax.device_put(2.0)) == 6.0
    jax.monitoring.unregister_event_listener(count)
    return len(hits)


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*tripled*") if path.is_file())


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    """If this fails after an update of JAX, adapt infra/compilation_cache.py to its private modules."""
    with compilation_cache(tmp_path):
        assert run_program() == 0
    assert len(entries(tmp_path)) == 1
    assert run_program() == 0, "no cache outside of the block"
    with compilation_cache(tmp_path):
        assert run_program() > 0


def test_a_program_of_another_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ProgramFiles(tmp_path)
    programs.put("key", b"program")

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert programs.get("key") == b"program"


@pytest.mark.parametrize("damage", ("empty", "truncated", "changed", "garbage", "directory"))
def test_a_broken_entry_is_compiled_again_and_replaced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, damage: str
) -> None:
    with compilation_cache(tmp_path):
        run_program()
        [entry] = entries(tmp_path)
        good = entry.read_bytes()
        if damage == "directory":
            entry.unlink()
            entry.mkdir()
        else:
            middle = len(good) // 2
            changed = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
            broken = {"empty": b"", "truncated": good[:middle], "changed": changed, "garbage": os.urandom(100)}
            entry.write_bytes(broken[damage])
        run_program()
        if damage != "directory":
            assert ProgramFiles(entry.parent).get(entry.name) is not None
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_an_unfinished_write_is_not_an_entry(tmp_path: Path) -> None:
    programs = ProgramFiles(tmp_path)
    (tmp_path / "a.12345678.partial").write_bytes(b"half")
    programs.put("a", b"whole")
    assert programs.get("a") == b"whole" and programs.get("b") is None
    os.utime(tmp_path / "a.12345678.partial", (0, 0))
    programs.put("b", b"another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "what a killed process left is removed"


def test_the_entries_that_were_unused_for_longest_make_room(tmp_path: Path) -> None:
    programs = ProgramFiles(tmp_path, max_bytes=300)
    for second, key in enumerate("abc"):
        programs.put(key, bytes(50))
        os.utime(tmp_path / key, (second, second))
    assert programs.get("a") == bytes(50)  # Used now.
    programs.put("d", bytes(50))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_directory_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rpt_jax")
    (tmp_path / "file").touch()
    with compilation_cache(tmp_path / "file"):
        assert run_program() == 0
    programs = ProgramFiles(tmp_path / "gone")
    programs.put("a", b"1")
    programs.put("b", b"2")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


@pytest.mark.parametrize("module", [None, types.ModuleType("changed")], ids=["gone", "changed"])
def test_a_release_of_jax_that_holds_its_cache_elsewhere_runs_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: types.ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "jax._src.compilation_cache", module)
    with compilation_cache(tmp_path):
        assert "Compiled programs are not kept" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_users_own_cache_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "rpt_jax" / "compiled"
    jax.config.update("jax_enable_compilation_cache", False)
    with compilation_cache(tmp_path):
        run_program()
    assert not entries(tmp_path)
