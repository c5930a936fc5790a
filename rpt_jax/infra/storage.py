"""Object storage: files at URLs, such as gs://bucket/run or any other that fsspec opens, by way of copies on the local disk.

All other code reads and writes local files, and a path that is local is never touched here. A copy is a directory under
`rpt_jax/remote` in the user's cache directory. Its index says which URL it is a copy of, so a path in it leads to its URL, and
which version of every object it has, so that only what has changed is copied in either direction.

A checkpoint counts as complete once the object `checkpoints/STEP.committed` exists, which is written after all of its files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import glob
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.user_paths import PATH_FIELDS, URL, cache_directory, is_url, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.digest import digest
from rpt_jax.infra.run_format import CHECKPOINTS, MODEL_CONFIG_FILE, RESULT

if TYPE_CHECKING:
    from etils import epath

logger = logging.getLogger(__name__)

LOCK = "lock"  # Of a run directory, here and there; never copied.
# Folders of a run that are of no use to others but `convert`, and large.
LARGE_FOLDERS = frozenset({CHECKPOINTS, "corpus", "damaged"})
_INDEX = ".rpt_jax_index.json"
_INDEX_LOCK = ".rpt_jax_index.lock"
_COMMITTED = ".committed"
INDEX_FILES = (_INDEX, _INDEX_LOCK)  # Of a copy, in its root.
_NOT_COPIED = (LOCK, *INDEX_FILES)
# Unfinished files and directories of this package, of orbax, and of a download.
_UNFINISHED = re.compile(r"\.partial(?:/|$)|\.orbax-checkpoint-tmp")
_CHECKPOINT = re.compile(rf"(?:^|.*/){CHECKPOINTS}/\d+(?=/)")
PARALLEL = 8
# A request to Google Cloud Storage is made again once no byte of it has come or gone for this long.
IDLE_SECONDS = 60.0
# What installs the package that opens a scheme.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


class _Entry(NamedTuple):
    """A file that is the same in both places: its local size and time of change, and the version of the object."""

    size: int
    mtime_ns: int
    version: str


# --- where copies are ------------------------------------------------------------------------------


def _copies() -> Path:
    """Return the directory of all copies."""
    return (cache_directory("remote") or Path(tempfile.gettempdir()) / "rpt_jax_remote").resolve()


def _read_index(root: Path) -> dict[str, Any]:
    """Return the index of a copy, empty if there is none or if it is damaged: then everything is copied again."""
    try:
        content = json.loads((root / _INDEX).read_bytes())
        return content if isinstance(content["url"], str) and isinstance(content["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def with_urls(text: str) -> str:
    """Return `text`, such as a path or a message, with the URL of every local copy in place of its directory."""
    copies = _copies()

    def url_of(match: re.Match[str]) -> str:
        return _read_index(copies / match[1]).get("url", match[0])

    prefix = f"{copies}{os.sep}"
    return re.sub(re.escape(prefix) + r"([\w.-]+)", url_of, text) if prefix in text else text


def named_by_urls(experiment: Experiment) -> dict[str, Any]:
    """Return the config fields by name, with the URL of every local copy: equal on all machines."""
    return {name: with_urls(value) if isinstance(value, str) else value for name, value in leaves(experiment)}


# --- errors ----------------------------------------------------------------------------------------


def reason(error: BaseException, url: str) -> str:
    """Return what is wrong with a URL, in a few words."""
    scheme = url.partition("://")[0].lower()
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(scheme)
        return (
            f"it needs a package: pip install -e '.[{extra}]', in the clone" if extra else " ".join(str(error).split())
        )
    if isinstance(error, TimeoutError):
        return "it does not answer"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _raise_instead(make_error: Callable[[str], Exception], url: str) -> Iterator[None]:
    """Raise `make_error(reason)` in place of any exception in the block: packages for object storage raise many classes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        raise make_error(reason(error, url)) from error


def usable_or_user_error(field: str, url: str) -> contextlib.AbstractContextManager[None]:
    """Raise UserError, about the field or flag that names a URL, in place of any exception in the block."""

    def make_error(reason: str) -> UserError:
        return UserError(
            f"{field}={url} cannot be used ({reason}). Check the URL, your credentials and your permissions there.",
            field=field,
        )

    return _raise_instead(make_error, url)


# --- copies ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RemoteCopy:
    """The local copy of what is below a URL.

    Attributes:
      url: of the directory.
      root: the local directory.
    """

    url: str
    root: Path

    @classmethod
    def at(cls, url: str, use: str = "") -> RemoteCopy:
        """Return the copy of a URL, which may be empty or out of date.

        Args:
          url: of a directory.
          use: what the copy is for; each use of a URL has a copy of its own. What is written to is not shared with readers.
        """
        url = url.rstrip("/")
        name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[:40]
        root = _copies() / f"{name}-{digest(url, use)[:12]}"
        root.mkdir(parents=True, exist_ok=True)
        if _read_index(root).get("url") != url:
            atomic_write(root / _INDEX, json.dumps({"url": url, "files": {}}))
        return cls(url, root)

    @classmethod
    def of(cls, path: Path) -> RemoteCopy | None:
        """Return the copy that a local path belongs to; None for any other path."""
        copies = _copies()
        resolved = path.resolve()
        if copies not in resolved.parents:
            return None
        root = copies / resolved.relative_to(copies).parts[0]
        url = _read_index(root).get("url")
        return cls(url, root) if url else None

    def open(self) -> tuple[Any, str]:
        """Return the fsspec file system and the path of the URL in it. Raises: what fsspec and its backends raise."""
        from fsspec.core import url_to_fs  # Takes 50 ms to import.

        if self.url.startswith(("gs://", "gcs://")):
            _set_up_google_cloud()
        file_system, path = url_to_fs(self.url)
        return file_system, path.rstrip("/")

    def fetch(self, field: str, pattern: str = "", *, skip: Collection[str] = (), reset: bool = True) -> None:
        """Copy what has changed at the URL.

        Args:
          field: the config field or flag that names the URL, for errors.
          pattern: a glob below the URL; "" for everything.
          skip: folders directly below the URL that are not copied.
          reset: undo what has changed here, files that exist here alone included; otherwise keep it.

        Raises: UserError.
        """
        with usable_or_user_error(field, self.url), self._locked() as files:
            file_system, path = self.open()
            found = _list_objects(file_system, path, pattern)
            if reset:
                self._delete_others(found)
                for name in files.keys() - found:
                    del files[name]
            marks = {name: version for name, (_, version) in found.items() if _is_mark(name)}
            wanted = [name for name in found.keys() - marks.keys() if PurePosixPath(name).parts[0] not in skip]
            checkpoints = {checkpoint for name in wanted if (checkpoint := _checkpoint_of(name))}
            incomplete = {checkpoint for checkpoint in checkpoints if checkpoint + _COMMITTED not in marks}
            if incomplete and not self.url.startswith("gs://"):  # There, orbax reads them itself.
                logger.warning("Not complete at %s, and left out: %s.", self.url, ", ".join(sorted(incomplete)))
            missing = [
                name
                for name in sorted(wanted)
                if _checkpoint_of(name) not in incomplete and not self._has(name, found[name][1], files, reset)
            ]
            if missing:
                size = sum(found[name][0] for name in missing)
                logger.info("Copying %s from %s (%.3f GiB).", _count(missing), self.url, size / 2**30)

            def download(name: str) -> None:
                target = self.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f"{target.name}.partial")
                file_system.get_file(f"{path}/{name}", str(partial))
                partial.replace(target)
                files[name] = self._entry(name, found[name][1])

            _for_each(download, missing)
            files.update({name: _Entry(0, 0, version) for name, version in marks.items()})

    def push(self) -> None:
        """Upload what has changed here, and delete at the URL what was deleted here.

        What is cut short leaves the URL as a run leaves its directory that is killed at some moment: checkpoints are written
        after everything that a run which resumes from them expects, each is marked as committed after its last file, a policy
        that replaces another one is without config.json meanwhile, and results come last.

        Raises: OSError.
        """
        with _raise_instead(self._upload_error, self.url), self._locked() as files:
            # Checkpoints are listed before the other files, so that what was written before one of them is uploaded before it.
            checkpoints = {checkpoint for name in self._local_files() if (checkpoint := _checkpoint_of(name))}
            here = self._local_files()
            changed = sorted(
                (name for name, stat in here.items() if name not in files or files[name][:2] != stat),
                key=lambda name: (here[name][1], PurePosixPath(name).name == MODEL_CONFIG_FILE),
            )
            # Also those that were saved again, after they were set aside as damaged.
            resaved = {checkpoint for name in changed if (checkpoint := _checkpoint_of(name))}
            unmarked = sorted(
                checkpoint
                for checkpoint in checkpoints
                if checkpoint in resaved or checkpoint + _COMMITTED not in files
            )
            deleted = sorted(name for name in files if name not in here and not _is_mark(name))
            if not changed and not deleted and not unmarked:
                return
            file_system, path = self.open()

            def delete(name: str) -> None:
                with contextlib.suppress(FileNotFoundError):
                    file_system.rm_file(f"{path}/{name}")
                del files[name]

            def upload(name: str) -> None:
                with contextlib.suppress(FileNotFoundError):  # Deleted since it was listed.
                    entry = self._entry(name, "")
                    file_system.put_file(str(self.root / name), f"{path}/{name}")
                    files[name] = entry._replace(version=_version(file_system.info(f"{path}/{name}")))

            others = [name for name in changed if not _checkpoint_of(name)]
            results = [name for name in others if PurePosixPath(name).name == RESULT]
            for name in (*others, *deleted):
                if PurePosixPath(name).name == MODEL_CONFIG_FILE and name in files:
                    delete(name)
            for name in others:
                if name not in results:
                    upload(name)
            for checkpoint in unmarked:
                mark = checkpoint + _COMMITTED
                if mark in files:
                    delete(mark)
                _for_each(upload, [name for name in changed if _checkpoint_of(name) == checkpoint])
                own = {name: stat for name, stat in here.items() if _checkpoint_of(name) == checkpoint}
                if all(name in files and files[name][:2] == stat for name, stat in own.items()):
                    file_system.pipe_file(f"{path}/{mark}", b"\n")
                    files[mark] = _Entry(0, 0, "")
            for name in results:
                upload(name)

            # A checkpoint loses its mark before its files.
            marks = {
                checkpoint + _COMMITTED for name in deleted if (checkpoint := _checkpoint_of(name)) not in checkpoints
            }
            for name in (*sorted(marks & files.keys()), *deleted):
                if name in files:
                    delete(name)

    def _upload_error(self, reason: str) -> OSError:
        return OSError(f"{self.url} could not be written ({reason})")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, _Entry]]:
        """Give the entries of the index, and write them back; one thread or process at a time."""
        with (self.root / _INDEX_LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = {name: _Entry(*entry) for name, entry in _read_index(self.root).get("files", {}).items()}
            before = dict(files)
            try:
                yield files
            finally:
                if files != before:
                    atomic_write(self.root / _INDEX, json.dumps({"url": self.url, "files": files}))

    def has_files(self) -> bool:
        """Return whether there is a file in the copy."""
        return bool(self._local_files())

    def _local_files(self) -> dict[str, tuple[int, int]]:
        """Return the size and the time of change of every file to upload, by name."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for file in names:
                name = Path(folder, file).relative_to(self.root).as_posix()
                if name in _NOT_COPIED or _UNFINISHED.search(name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[name] = self._entry(name, "")[:2]
        return found

    def _entry(self, name: str, version: str) -> _Entry:
        stat = (self.root / name).stat()
        return _Entry(size=stat.st_size, mtime_ns=stat.st_mtime_ns, version=version)

    def _has(self, name: str, version: str, files: Mapping[str, _Entry], reset: bool) -> bool:
        """Return whether a version of an object is here, or was; with `reset`, whether its file has not been changed since."""
        entry = files.get(name)
        if entry is None or entry.version != version:
            return False
        return not reset or ((self.root / name).exists() and self._entry(name, version) == entry)

    def _delete_others(self, kept: Collection[str]) -> None:
        """Delete every file that is not one of `kept`, unfinished ones included, and the folders that are empty then."""
        for folder, _, names in os.walk(self.root, topdown=False):
            for file in names:
                name = Path(folder, file).relative_to(self.root).as_posix()
                if name not in kept and name not in _NOT_COPIED:
                    Path(folder, file).unlink()
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def _set_up_google_cloud() -> None:
    """Let gcsfs and tensorstore, which orbax uses, make a request again after `IDLE_SECONDS`, and fail after several times.

    By default they wait for a lost answer forever (https://github.com/google/tensorstore/issues/291). s3fs does not. What the
    user has set remains. gcsfs also logs a failure with its traceback, which it raises.
    """
    from aiohttp import ClientTimeout  # pyright: ignore[reportMissingImports]
    from fsspec.config import conf

    limit = ClientTimeout(sock_connect=IDLE_SECONDS, sock_read=IDLE_SECONDS)
    conf.setdefault("gs", {}).setdefault("requests_timeout", limit)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{IDLE_SECONDS:.0f}")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def _list_objects(file_system: Any, path: str, pattern: str) -> dict[str, tuple[int, str]]:
    """Return the size and the version of every object below `path`, or of those that match, by its name there."""
    file_system.invalidate_cache()
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        if pattern:
            for match, info in file_system.glob(f"{path}/{pattern}", detail=True).items():
                found |= file_system.find(match, detail=True) if info["type"] == "directory" else {match: info}
        else:
            found = file_system.find(path, detail=True)
    objects = {
        name.removeprefix(path).lstrip("/"): (info.get("size") or 0, _version(info))
        for name, info in found.items()
        if info["type"] == "file" and not name.endswith("/")
    }
    if outside := [name for name in objects if ".." in PurePosixPath(name).parts]:
        raise ValueError(f"an object has the name {outside[0]!r}")
    return {name: info for name, info in objects.items() if name not in ("", *_NOT_COPIED)}


def _checkpoint_of(name: str) -> str:
    """Return the directory of the checkpoint that a file belongs to, such as "checkpoints/40"; "" if it belongs to none."""
    match = _CHECKPOINT.match(name)
    return match[0] if match else ""


def _is_mark(name: str) -> bool:
    return name.endswith(_COMMITTED) and bool(_checkpoint_of(f"{name.removesuffix(_COMMITTED)}/"))


def _version(info: Mapping[str, Any]) -> str:
    """Return what changes when an object does, from fsspec's description of it."""
    names = ("generation", "ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    value = next((info[name] for name in names if info.get(name)), "")
    # A listing and a single description may give a time in two ways.
    return f"{info.get('size')} {value.timestamp() if isinstance(value, datetime.datetime) else value}"


def _count(names: Collection[str]) -> str:
    return f"{len(names):,} file{'s' if len(names) != 1 else ''}"


def _for_each(function: Callable[[str], None], names: Collection[str]) -> None:
    """Call a function for every name, several at a time. Raises: what one of the calls raises."""
    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(function, names))


# --- what the rest of the package calls -------------------------------------------------------------


def fetch(location: str, field: str, *, skip: Collection[str] = ()) -> Path:
    """Return a local path with the content of a file, a directory or a glob that a user named.

    Args:
      location: a path, which is returned with `~` expanded and not looked at, or a URL, of which a copy is made or brought up to
        date.
      field: the config field or flag that has this value, for errors.
      skip: folders of a directory that are not copied.

    Raises: UserError, if it cannot be read or there is nothing.
    """
    if not is_url(location):
        return user_path(location)
    directory, pattern = _split_glob(location.rstrip("/"))
    if not pattern:
        with usable_or_user_error(field, location):
            file_system, path = RemoteCopy(directory, Path()).open()
            if file_system.isfile(path):
                directory, _, pattern = directory.rpartition("/")
    copy = RemoteCopy.at(directory, use=pattern)
    copy.fetch(field, pattern, skip=skip)
    if not copy.has_files():
        raise UserError(
            f"{field}={location} has no files. Check the URL, and that your credentials may list the bucket.",
            field=field,
        )
    return copy.root / pattern


def _split_glob(location: str) -> tuple[str, str]:
    """Return the directory that a URL begins with and the glob below it, "" if there is none."""
    parts = location.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def push(path: Path) -> None:
    """Upload what has changed in the copy that a path belongs to; nothing for any other path. Raises: OSError."""
    if copy := RemoteCopy.of(path):
        copy.push()


def checkpoint_directory(workdir: Path, name: str = CHECKPOINTS) -> epath.Path:
    """Return where orbax keeps the checkpoints of a run: on the disk or, as it can, in Google Cloud Storage itself.

    Args:
      workdir: directory of the run.
      name: of the directory in it.
    """
    from etils import epath

    copy = RemoteCopy.of(workdir)
    if copy is None or not copy.url.startswith("gs://"):
        return epath.Path((workdir / name).resolve())
    return epath.Path(copy.url) / workdir.resolve().relative_to(copy.root) / name


def is_remote(path: PurePath) -> bool:
    """Return whether a path of `checkpoint_directory` is in object storage."""
    return is_url(os.fspath(path))


def move_directory(source: epath.Path, target: epath.Path) -> None:
    """Move a directory, on the disk or in object storage."""
    if not is_remote(source):
        source.rename(target)
        return
    file_system, path = RemoteCopy(os.fspath(source), Path()).open()
    file_system.mv(path, file_system._strip_protocol(os.fspath(target)), recursive=True)


def fetch_inputs(experiment: Experiment) -> Experiment:
    """Return the experiment with local copies in place of the URLs in its path fields.

    `pretrain.export` becomes a copy of what is there; `push` uploads what is written to it.

    Raises: UserError, if one cannot be read.
    """
    for name in PATH_FIELDS:
        section_name, _, field = name.partition(".")
        section = getattr(experiment, section_name)
        value = getattr(section, field)
        if not is_url(value) or (name == "data.path" and section.source != "path"):
            continue
        if name == "pretrain.export":  # The policy that is there, if any, and what will be written.
            copy = RemoteCopy.at(value, use=name)
            copy.fetch(name)
            local = str(copy.root)
        else:
            # A policy may be that of a run.
            skip = LARGE_FOLDERS if name == "policy.path" else frozenset()
            copies = functools.partial(fetch, field=name, skip=skip)
            local = URL.sub(lambda match, copies=copies: f"{match['before']}{copies(match['url'])}", value)
        section = dataclasses.replace(section, **{field: local})
        experiment = dataclasses.replace(experiment, **{section_name: section})
    return experiment
