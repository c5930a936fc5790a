"""Experiment trackers that get the metrics and rollouts of a run: Weights & Biases and trackio, which share one interface.

A tracker is imported only if the config names it. Where and how it stores a run is its own affair (`WANDB_MODE`, `TRACKIO_DIR`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpt_jax.config import Experiment, LoggingConfig
from rpt_jax.config.schema import tracker_names
from rpt_jax.distributed.processes import is_leader
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.storage import named_by_urls, with_urls
from rpt_jax.infra.workdir import COLD_START, TRACKERS_FILE

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


def check_installed(config: LoggingConfig) -> None:
    """Check that the trackers of a config are installed. Raises: UserError."""
    for name in tracker_names(config.trackers):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.trackers='{config.trackers}' needs the package {name}, which is not installed: "
                f"pip install -e '.[{name}]', in the clone.",
                field="logging.trackers",
            )


class Trackers:
    """The trackers of a run. A run that resumes continues its run at each of them.

    What a tracker raises, for want of a network, a login or disk space, is a warning, and this tracker gets nothing more:
    training goes on. With several processes, only the leader logs.
    """

    def __init__(self, experiment: Experiment, workdir: Path):
        """
        Args:
          experiment: the config, which names the trackers and is shown by them.
          workdir: directory of the run; the ids of the tracked runs are kept there.
        """
        self._runs: dict[str, Any] = {}
        self._new: set[str] = set()  # Trackers that have nothing of this run yet.
        config = experiment.logging
        arguments = {"project": config.project, "config": named_by_urls(experiment), "resume": "allow"}
        names = tracker_names(config.trackers) if is_leader() else ()
        if not names:
            return
        place = Path(with_urls(str(workdir.resolve())))
        name = f"{place.parent.name}_{COLD_START}" if place.name == COLD_START else place.name
        path = workdir / TRACKERS_FILE
        ids = _read_ids(path)
        self._new = set(names) - set(ids)
        ids |= {tracker: secrets.token_hex(4) for tracker in names if tracker in self._new}
        for tracker in names:
            identity = _identity(tracker, name, ids[tracker], workdir)
            self._attempt(tracker, functools.partial(self._start, tracker, arguments | identity))
        workdir.mkdir(parents=True, exist_ok=True)
        started = {tracker: ids[tracker] for tracker in ids if tracker in self._runs or tracker not in self._new}
        atomic_write(path, json.dumps(started) + "\n")

    @property
    def are_running(self) -> bool:
        """Whether there is a tracker that has not failed."""
        return bool(self._runs)

    def log(self, step: int, values: Mapping[str, float], *, logged: bool = False) -> None:
        """Log the scalars of a step.

        Args:
          step: number of the step.
          values: scalars by name.
          logged: whether an earlier run in the workdir has logged this step; then only trackers that are new get it.
        """
        for tracker, run in list(self._runs.items()):
            if not logged or tracker in self._new:
                self._attempt(tracker, functools.partial(run.log, dict(values), step=step))

    def log_table(self, key: str, step: int, table: pa.Table) -> None:
        """Log a table, one row for each rollout."""
        rows = [list(row.values()) for row in table.to_pylist()]
        for tracker, run in list(self._runs.items()):
            self._attempt(tracker, functools.partial(_log_table, tracker, run, key, step, table.column_names, rows))

    def close(self) -> None:
        """Finish the runs of the trackers."""
        for tracker, run in list(self._runs.items()):
            self._attempt(tracker, run.finish)
        self._runs.clear()

    def _start(self, tracker: str, arguments: Mapping[str, Any]) -> None:
        self._runs[tracker] = importlib.import_module(tracker).init(**arguments)

    def _attempt(self, tracker: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker may raise anything, and training does not need it.
            self._runs.pop(tracker, None)
            logger.warning(
                "The tracker %s failed (%s: %s) and gets nothing more of this run; the run goes on.",
                tracker,
                type(error).__name__,
                " ".join(str(error).split()),
            )


def _identity(tracker: str, name: str, run_id: str, workdir: Path) -> dict[str, Any]:
    """Return the arguments that tell a tracker which run this is: wandb knows a run by its id, trackio by its name."""
    if tracker == "wandb":
        return {"id": run_id, "name": name, "dir": str(workdir)}
    return {"name": f"{name}-{run_id}"}


def _log_table(
    tracker: str, run: Any, key: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    table = importlib.import_module(tracker).Table(columns=list(columns), data=list(rows))
    run.log({key: table}, step=step)


def _read_ids(path: Path) -> dict[str, str]:
    """Return the stored ids by tracker; none if the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
        return {str(tracker): str(run_id) for tracker, run_id in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
