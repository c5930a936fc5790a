"""Traces that a policy sampled and a verifier accepted: the files of task "traces", and the trace writer that reads them.

A run of task "traces" leaves one file for each batch of prompts, `traces/00000.jsonl.gz` and so on. The first line says what the
batch was sampled from and what it cost; every other line is a trace, with the token ids of its whole prompt and of its response:

    {"window": 3, "position": 81, "prompt": [1, …, 5], "response": [407, …, 2], "prompt_text": "…", "response_text": "…"}
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.config import PretrainConfig
from rpt_jax.config.user_paths import check_location
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.digest import digest
from rpt_jax.infra.run_format import FORMAT, format_stamp
from rpt_jax.infra.storage import LARGE_FOLDERS, fetch
from rpt_jax.infra.workdir import RESULT, TRACES
from rpt_jax.prompts.traces import Drill
from rpt_jax.registry import TRACE_WRITERS
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_PATH = "pretrain.trace_options.path"
_REMEDY = "Delete the file, and rerun the command of task 'traces' that wrote it."


class TraceBatch(NamedTuple):
    """The contents of a file of traces.

    Attributes:
      header: what the batch was sampled from ("policy", "tokenizer", …) and what it cost.
      traces: one dict for each kept response, with its ids as "prompt" and "response".
    """

    header: dict[str, Any]
    traces: list[dict[str, Any]]


def batch_path(workdir: Path, number: int) -> Path:
    """Return the file of the batch `number` of a run, counted from 0."""
    return workdir / TRACES / f"{number:05}.jsonl.gz"


def write_batch(path: Path, batch: TraceBatch) -> None:
    """Write a file of traces atomically."""
    lines = [{**format_stamp(), **batch.header, "traces": len(batch.traces)}, *batch.traces]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, gzip.compress(text.encode(), mtime=0))


def read_batch(path: Path, field: str) -> TraceBatch:
    """Read a file that `write_batch` has written.

    Args:
      path: the file.
      field: the config field or flag to name if it cannot be used.

    Raises: UserError, naming the line and what is wrong with it.
    """
    try:
        # Texts may have line separators that JSON does not escape, at which `splitlines` divides.
        lines = gzip.decompress(path.read_bytes()).decode().removesuffix("\n").split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{field}: {path} cannot be read ({error}). {_REMEDY}", field=field) from None
    header = _parse(lines[0])
    if header is None or header.get("format") != FORMAT:
        raise UserError(f"{field}: {path}:1 is not the header of traces in format {FORMAT}. {_REMEDY}", field=field)
    traces = []
    for number, line in enumerate(lines[1:], start=2):
        trace = _parse(line)
        if trace is None or not all(_are_ids(trace.get(name)) for name in ("prompt", "response")):
            raise UserError(
                f"{field}: {path}:{number} has no token ids 'prompt' and 'response'. {_REMEDY}", field=field
            )
        traces.append(trace)
    if header.get("traces") != len(traces):
        raise UserError(
            f"{field}: {path}:{len(lines)} is the last line, but the header counts {header.get('traces')} traces. {_REMEDY}",
            field=field,
        )
    return TraceBatch(header=header, traces=traces)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(i) is int and i >= 0 for i in values)


@functools.lru_cache(maxsize=1)  # A trace writer is made for every window.
def read_traces(paths: str, fingerprint: str, row_tokens: int) -> tuple[Drill, ...]:
    """Return the traces of finished runs of task "traces" that fit in a row.

    Args:
      paths: directories of runs, separated by commas.
      fingerprint: of the tokenizer.
      row_tokens: `pretrain.row_tokens`.

    Raises: UserError, if a run is not finished or of another tokenizer, if a file is damaged, or if no trace fits.
    """
    traces = []
    for directory in (fetch(path.strip(), _PATH, skip=LARGE_FOLDERS) for path in paths.split(",")):
        if not (directory / RESULT).is_file():
            raise UserError(
                f"{_PATH}: {directory} is not the directory of a finished run of task 'traces' ({RESULT} is missing).",
                field=_PATH,
            )
        for path in sorted((directory / TRACES).glob("*.jsonl.gz")):
            batch = read_batch(path, _PATH)
            if batch.header.get("tokenizer") != fingerprint:
                raise UserError(
                    f"{_PATH}: {path} has the token ids of another tokenizer than the policy's. Sample traces with a policy that "
                    "has the same one.",
                    field=_PATH,
                )
            traces += [Drill(prompt=trace["prompt"], response=trace["response"]) for trace in batch.traces]
    if not traces:
        raise UserError(f"{_PATH}={paths}: no response was accepted, so there are no traces.", field=_PATH)

    # The last token of a response is only predicted, so it takes no place in a row.
    sizes = [len(trace.prompt or ()) + len(trace.response) - 1 for trace in traces]
    fitting = tuple(trace for trace, size in zip(traces, sizes, strict=True) if size <= row_tokens)
    if len(fitting) < len(traces):
        message = (
            f"{len(traces) - len(fitting):,} of {len(traces):,} traces are left out: with their prompts, they have more than "
            f"pretrain.row_tokens={row_tokens} tokens (the longest has {max(sizes):,})."
        )
        if not fitting:
            raise UserError(f"{message} None is left: raise it.", field="pretrain.row_tokens")
        logger.info(message)
    return fitting


@dataclasses.dataclass(frozen=True)
class SampledOptions:
    """Options of sampled traces (`pretrain.trace_options`)."""

    # Directory of a finished run of task "traces" by a policy with the same tokenizer; several are separated by commas.
    path: str = ""

    def __post_init__(self) -> None:
        check_location(_PATH, self.path)


def check_sampled_traces(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Check that there are traces of this tokenizer that fit in a row. Raises: UserError."""
    _read(config, tokenizer)


def _read(config: PretrainConfig, tokenizer: Tokenizer) -> tuple[Drill, ...]:
    options: SampledOptions = config.trace_options or SampledOptions()
    if not options.path:
        raise UserError(
            f"{_PATH} is empty: pretrain.traces='sampled' needs the directory of a finished run of task 'traces'.",
            field=_PATH,
        )
    return read_traces(options.path, tokenizer.fingerprint, config.row_tokens)


def traces_fingerprint(config: PretrainConfig, tokenizer: Tokenizer) -> str:
    """Return a digest of the sampled traces that a run learns; "" for none. Raises: UserError, if they cannot be used."""
    if config.traces != "sampled" or not config.trace_weight:
        return ""
    return digest([[trace.prompt, trace.response] for trace in _read(config, tokenizer)])


@TRACE_WRITERS.register("sampled", options=SampledOptions, check=check_sampled_traces)
class SampledTraces:
    """Traces that a policy sampled and a verifier accepted, drawn at random for each window, with their own prompts.

    None belongs to the window: a prompt may be a question, or end in a document that the policy read elsewhere.
    """

    num_positions = 0
    preferred_positions: Sequence[int] = ()
    preferred_fraction = 0.0

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], config: PretrainConfig, max_tokens: int):
        """Raises: UserError, as `check_sampled_traces` does. Arguments as of `prompts.traces.RecallTraces`."""
        del ids, max_tokens
        self._traces = _read(config, tokenizer)
        self._count = config.traces_per_window

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        raise NotImplementedError("sampled traces are at no position of the window")

    def drills(self, rng: np.random.Generator) -> list[Drill]:
        """Return `pretrain.traces_per_window` traces, all different."""
        drawn = rng.choice(len(self._traces), size=min(self._count, len(self._traces)), replace=False)
        return [self._traces[i] for i in drawn]


def first_distinct(responses: Iterable[Sequence[int]], limit: int) -> list[list[int]]:
    """Return the first `limit` different ones of some responses."""
    distinct = dict.fromkeys(tuple(response) for response in responses)
    return [list(response) for response in distinct][:limit]
