"""A server of Google Cloud Storage in memory: gcp-storage-emulator, and what it lacks for runs that share a bucket.

    python -m tests.helpers.gcs_server PORT BUCKET

The emulator answers one request at a time, ignores the conditions of a request (`ifGenerationMatch`), and does not say which
generation of an object it returns. Locks and tensorstore need the conditions, and a tensorstore that reads back what it wrote
needs the generation: without it, the next conditional write fails.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage

Handler = Callable[[server.Request, server.Response, Storage], None]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


def _object_of(request: server.Request) -> tuple[str, str] | None:
    """Return the bucket and the name of the object that a request reads, writes or deletes; None if it is about no single one."""
    params = request.params
    if "bucket_name" not in params:
        return None
    name = params.get("object_id") or request.query.get("name", [""])[0]
    if not name and isinstance(request.data, dict):
        name = request.data.get("meta", request.data).get("name", "")
    return (params["bucket_name"], name) if name else None


def _generation(storage: Storage, bucket: str, name: str) -> str:
    """Return the generation of an object, "0" if there is none."""
    return storage.objects.get(bucket, {}).get(name, {}).get("generation", "0")


def _with_generations(handle: Handler, lock: threading.Lock) -> Handler:
    """Return a handler that checks the conditions of a request, calls `handle`, and adds the generation to the answer."""

    def handle_conditionally(request: server.Request, response: server.Response, storage: Storage) -> None:
        found = _object_of(request)  # Reads the body of the request, which may take long.
        with lock:
            if found:
                generation = _generation(storage, *found)
                if request.query.get("ifGenerationMatch", [generation]) != [generation]:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return
                if request.query.get("ifGenerationNotMatch") == [generation]:
                    response.status = HTTPStatus.NOT_MODIFIED
                    return
            handle(request, response, storage)
            if found:
                response["x-goog-generation"] = _generation(storage, *found)

    return handle_conditionally


def main(port: int, bucket: str) -> None:
    """Serve an empty bucket until the process is killed."""
    lock = threading.Lock()  # `Storage` is not thread-safe.
    server.HANDLERS = tuple(
        (path, {method: _with_generations(handle, lock) for method, handle in handlers.items()})
        for path, handlers in server.HANDLERS
    )
    storage = Storage(use_memory_fs=True)
    create_bucket(bucket, storage)
    _Server(("127.0.0.1", port), partial(server.RequestHandler, storage)).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
