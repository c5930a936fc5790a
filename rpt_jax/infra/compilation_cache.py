"""The compilation cache: compiled programs on disk, so that a restarted run does not compile them again.

JAX's own cache directory is not enough for a cache that is on by default: its entries are written in place, so that a process
that is killed leaves half a program behind, which every later run complains about. Here an entry appears whole or not at all, has
a checksum, and is dropped if that is wrong; nothing that happens to the cache ends a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from rpt_jax.config.user_paths import cache_directory, user_path
from rpt_jax.infra.atomic_write import atomic_write

logger = logging.getLogger(__name__)

_MAX_BYTES = 2 * 2**30  # Of all entries for one kind of machine; the oldest go first.
_CHECKSUM_BYTES = 32
_ABANDONED_SECONDS = 3600.0  # A file that has been unfinished for so long belongs to a process that was killed.


class ProgramFiles:
    """Files of compiled programs, with their checksums; any number of processes may use a directory at once.

    It has the interface that JAX expects of a cache.

    Args:
      directory: of the files; it exists.
      max_bytes: size of all files together, above which those go that were unused for longest.
    """

    def __init__(self, directory: Path, max_bytes: int = _MAX_BYTES):
        self._path = directory
        self._max_bytes = max_bytes
        self._is_writable = True

    def get(self, key: str) -> bytes | None:
        """Return the program of `key`, or None if there is none or it is damaged."""
        path = self._path / key
        try:
            content = path.read_bytes()
            checksum, program = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
            if hashlib.sha256(program).digest() != checksum:
                path.unlink()
                return None
        except OSError:
            return None
        # The time of the last use decides which entries stay; only the owner of a file, who may be another user, can set it.
        with contextlib.suppress(OSError):
            os.utime(path)
        return program

    def put(self, key: str, value: bytes) -> None:
        """Write the program of `key`. If that is impossible, say so once and go on without."""
        if not self._is_writable:
            return
        try:
            atomic_write(self._path / key, hashlib.sha256(value).digest() + value)
            self._remove_oldest()
        except OSError as error:
            self._is_writable = False
            logger.info("Compiled programs are no longer kept in %s: %s.", self._path, error.strerror)

    def _remove_oldest(self) -> None:
        entries = []
        for path in self._path.iterdir():
            # Another process may remove files at the same time.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".partial" and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
                else:
                    entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def default_directory() -> Path | None:
    """Return the directory for compiled programs in the user's cache directory, or None if the user has no home."""
    return cache_directory("compiled")


def chosen_directory(flag: str | None) -> Path | None:
    """Return the directory that `--compilation_cache` names, or the default one without it; None for no cache."""
    if not flag:
        return default_directory()
    return None if flag == "off" else user_path(flag)


@contextlib.contextmanager
def compilation_cache(directory: Path | None) -> Iterator[None]:
    """Keep the programs that are compiled inside the block, and load those that an earlier process compiled.

    A user's own JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE=0 takes precedence.

    Args:
      directory: for the programs; made if it does not exist. None: no cache.
    """
    settings = jax.config.values
    is_users_choice = bool(settings["jax_compilation_cache_dir"]) or not settings["jax_enable_compilation_cache"]
    if directory is None or is_users_choice:
        yield
        return
    # A program for a CPU is machine code: another CPU that shares the directory may lack its instructions.
    directory = directory / _processor()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.info("Compiled programs are not kept: %s (%s).", error.strerror, directory)
        yield
        return
    with _jax_cache(ProgramFiles(directory)):
        yield


@contextlib.contextmanager
def _jax_cache(programs: ProgramFiles) -> Iterator[None]:
    """Make `programs` the cache of JAX inside the block; if that is impossible, warn and go on without a cache.

    JAX has no public way to be given a cache, only a directory. This module and its variable are private to JAX (checked with
    jax 0.10.2, 0.11.2 and 0.12.0); tests/infra/test_compilation_cache.py fails if a release changes them.
    """
    try:
        module: Any = importlib.import_module("jax._src.compilation_cache")
        earlier = module._cache
    except (ImportError, AttributeError):
        logger.warning("Compiled programs are not kept: jax %s holds its cache elsewhere.", jax.__version__)
        yield
        return
    module._cache = programs
    try:
        yield
    finally:
        module._cache = earlier


def _processor() -> str:
    """Return a name for what machine code depends on: the architecture and, on Linux, the instructions of the CPU."""
    description = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        description = next((line for line in lines if line.startswith(("flags", "Features"))), description)
    return f"{platform.machine()}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
