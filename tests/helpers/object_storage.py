"""Servers of object storage on this machine, and runs of the trainer that use them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, free_port

BUCKET = "bucket"


def require(*packages: str) -> None:
    """Skip the test if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install -e '.[s3,gcs,storage-servers]'")


@contextlib.contextmanager
def server(command: list[str], port: int, environ: dict[str, str]) -> Iterator[subprocess.Popen[Any]]:
    """Run a server until the end of the block, in which this process has the environment of processes that use it."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(port), process)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[Any]:
    """Run a server of S3 with an empty bucket; give a file system that uses it."""
    require("moto", "s3fs", "flask")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environ = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with server([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, environ):
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem(use_listings_cache=False)
        files.mkdir(BUCKET)
        yield files
        s3fs.S3FileSystem.clear_instance_cache()


def gcs_environ(port: int) -> dict[str, str]:
    """Return the environment of processes that use a server of Google Cloud Storage on this machine."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It would ask a gRPC service, which the server has not.
    }


@contextlib.contextmanager
def gcs_server() -> Iterator[tuple[Any, subprocess.Popen[Any]]]:
    """Run a server of Google Cloud Storage with an empty bucket; give a file system that uses it, and its process."""
    require("gcp_storage_emulator", "gcsfs")
    port = free_port()
    command = [sys.executable, "-m", "tests.helpers.gcs_server", str(port), BUCKET]
    with server(command, port, gcs_environ(port)) as process:
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        yield gcsfs.GCSFileSystem(token="anon", use_listings_cache=False), process
        gcsfs.GCSFileSystem.clear_instance_cache()


def start_run(cache: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    """Start the trainer on a machine whose disk holds the directory `cache` alone; see `remote_child` for variables."""
    environ = os.environ | {"XDG_CACHE_HOME": str(cache)} | environ
    command = [sys.executable, "-m", "tests.helpers.remote_child", *arguments, "--compilation_cache=off"]
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=-1, stderr=subprocess.STDOUT, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait until a condition holds while a process runs."""
    deadline = time.monotonic() + CHILD_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
