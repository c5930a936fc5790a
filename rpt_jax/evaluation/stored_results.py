"""The results of an evaluation on disk: kept batch by batch while it runs, then one JSON file and one line a question."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.disk import check_writable

SUMMARY = "evaluation.json"
RECORDS = "records.jsonl"
_SETTINGS = "settings.json"
_BATCHES = "batches"
_EVALUATED = "evaluated"  # In the folder of the batches.

Record = dict[str, Any]  # The result of one question or position, as JSON values.


class ResultStore:
    """The directory of an evaluation.

    Every batch is written atomically, so an evaluation that was interrupted at any moment goes on after its last batch. Once all
    are there, `finish` writes `records.jsonl`, one line a question or position, and `evaluation.json`.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, restart: bool = False):
        """
        Args:
          directory: created if it does not exist.
          settings: everything that the results depend on, as JSON values.
          restart: delete the results that are there.

        Raises: UserError, if the directory has results of other settings or a damaged file, or cannot be written.
        """
        self._directory = directory
        self._settings = json.loads(json.dumps(settings))
        check_writable(directory, "--workdir")
        if restart:
            self._delete()
        self._check_settings()
        self._batches = directory / _BATCHES
        if self.summary() is None:
            self._batches.mkdir(parents=True, exist_ok=True)
            atomic_write(directory / _SETTINGS, json.dumps(self._settings, indent=1) + "\n")

    def check_evaluated(self, fingerprint: str) -> None:
        """Check that the stored batches are of the same questions or positions; the first call notes which they are.

        Args:
          fingerprint: digest of what is evaluated. It is not one of the settings, because it is only known after loading.

        Raises: UserError, if the batches are of others.
        """
        path = self._batches / _EVALUATED
        if not path.exists():
            atomic_write(path, fingerprint)
        elif path.read_text() != fingerprint:
            raise UserError(
                f"--workdir={self._directory} has results of other questions or positions, because the files that the config "
                "names have changed. Give --restart to delete them, or another --workdir.",
                field="--workdir",
            )

    def has(self, batch: int) -> bool:
        """Return whether the batch is complete."""
        return self._path(batch).exists()

    def write(self, batch: int, records: Sequence[Record]) -> None:
        """Store the results of a batch."""
        atomic_write(self._path(batch), _lines(records))

    def read(self, batches: int) -> list[Record]:
        """Return the results of the first `batches` batches, all of which are complete. Raises: UserError, if one is damaged."""
        records: list[Record] = []
        for batch in range(batches):
            with _undamaged(self._path(batch)):
                records += read_lines(self._path(batch))
        return records

    def finish(self, records: Sequence[Record], summary: Mapping[str, Any]) -> None:
        """Write the files of a finished evaluation; the batches are deleted.

        Args:
          records: the results of all batches, as they shall be stored.
          summary: the content of `evaluation.json`.
        """
        atomic_write(self._directory / RECORDS, _lines(records))
        atomic_write(self._directory / SUMMARY, json.dumps(summary, indent=1) + "\n")
        shutil.rmtree(self._batches)

    def summary(self) -> dict[str, Any] | None:
        """Return the content of `evaluation.json`, or None if the evaluation is not finished. Raises: UserError."""
        path = self._directory / SUMMARY
        if not path.exists():
            return None
        with _undamaged(path):
            return _as_object(json.loads(path.read_bytes()))

    def _path(self, batch: int) -> Path:
        return self._batches / f"{batch:06d}.jsonl"

    def _delete(self) -> None:
        for name in (SUMMARY, RECORDS, _SETTINGS):
            (self._directory / name).unlink(missing_ok=True)
        shutil.rmtree(self._directory / _BATCHES, ignore_errors=True)

    def _check_settings(self) -> None:
        """Raise UserError if there are results of other settings."""
        path = self._directory / _SETTINGS
        if not path.exists():
            return
        with _undamaged(path):
            stored = _as_object(json.loads(path.read_bytes()))
        names = [name for name in {**stored, **self._settings} if stored.get(name) != self._settings.get(name)]
        if names:
            changes = "; ".join(
                f"{name}: {stored.get(name)!r} there, {self._settings.get(name)!r} now" for name in names
            )
            raise UserError(
                f"--workdir={self._directory} has results of other settings ({changes}). Give --restart to delete them, or "
                "another --workdir.",
                field="--workdir",
            )


def read_results(directory: Path, field: str) -> tuple[dict[str, Any], list[Record]]:
    """Return the summary and the records of a finished evaluation.

    Args:
      directory: its --workdir.
      field: the flag that gives the directory, for errors.

    Raises: UserError, if it is not one.
    """
    try:
        summary = _as_object(json.loads((directory / SUMMARY).read_bytes()), "suite", "policy")
        return summary, [_as_object(record, "id", "category", "scores") for record in read_lines(directory / RECORDS)]
    except OSError:
        raise UserError(
            f"{field}: {directory} is not the --workdir of a finished evaluation: it has no {SUMMARY} and {RECORDS}.",
            field=field,
        ) from None
    except ValueError as error:
        raise UserError(f"{field}: a file in {directory} is damaged ({error}). Evaluate again.", field=field) from None


def _as_object(value: Any, *keys: str) -> dict[str, Any]:
    """Return a JSON value that must be an object with these keys. Raises: ValueError."""
    if not isinstance(value, dict):
        raise ValueError("a JSON object is missing")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"'{missing[0]}' is missing")
    return value


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turn an error of reading a file of an evaluation that is not finished into a `UserError` that names it."""
    try:
        yield
    except ValueError:
        raise UserError(f"{path} is damaged. Give --restart to evaluate again.", field="--workdir") from None


def read_lines(path: Path) -> list[Record]:
    """Return the JSON object of each line of a file. Raises: OSError or ValueError."""
    with path.open(encoding="utf-8") as file:
        return [_as_object(json.loads(line)) for line in file]


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
