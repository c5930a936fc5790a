"""Serves the page of runs on this machine, and a version by which the page knows that it is out of date."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rpt_jax.infra.rollout_files import ROLLOUTS
from rpt_jax.infra.run_format import METRICS
from rpt_jax.infra.workdir import RESULT, RUN_CONFIG
from rpt_jax.run_page.build import render_page
from rpt_jax.run_page.reading import read_run

_HOSTS = ("127.0.0.1", "localhost")


class RunServer(ThreadingHTTPServer):
    """Answers `/` with the page, made anew when the runs have changed, and `/version` with a digest of their files.

    It listens on this machine only, and answers requests to this machine's name only, so that no other site can read the runs.
    """

    def __init__(self, workdirs: Sequence[Path], port: int):
        """
        Args:
          workdirs: directories of the runs.
          port: to listen on; 0 for any.

        Raises: OSError, if the port is in use.
        """
        super().__init__((_HOSTS[0], port), _Handler)
        self._workdirs = workdirs
        self._lock = threading.Lock()
        self._rendered = ("", "")  # Version and page.

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{_HOSTS[0]}:{self.server_port}/"

    def version(self) -> str:
        """Return a digest of the names, times and sizes of the files that the page is made from."""
        patterns = (METRICS, RUN_CONFIG, RESULT, f"{ROLLOUTS}/*")
        paths = sorted(path for workdir in self._workdirs for pattern in patterns for path in workdir.glob(pattern))
        return hashlib.sha256(repr([_state(path) for path in paths]).encode()).hexdigest()

    def page(self) -> str:
        """Return the page of the newest version."""
        with self._lock:
            version = self.version()
            if version != self._rendered[0]:
                runs = [read_run(workdir, len(self._workdirs)) for workdir in self._workdirs]
                self._rendered = (version, render_page(runs, live=True))
            return self._rendered[1]


class _Handler(BaseHTTPRequestHandler):
    server: RunServer  # pyright: ignore[reportIncompatibleVariableOverride] - always the one that makes it.

    def do_GET(self) -> None:
        """Answer a request."""
        contents = {"/": ("text/html", self.server.page), "/version": ("text/plain", self.server.version)}
        if self.headers.get("Host", "").partition(":")[0] not in _HOSTS:  # Without the port if it is 80.
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path not in contents:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            kind, make = contents[self.path]
            body = make().encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do not print requests."""


def _state(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:  # The run has just renamed it.
        return str(path), 0, 0
    return str(path), stat.st_mtime_ns, stat.st_size
