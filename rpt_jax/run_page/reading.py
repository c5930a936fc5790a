"""What the page shows of a run, read from its directory.

Every part is optional: a run that has just begun, was interrupted, or was written by another version has a page with what can be
read, and sentences on what cannot.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.diagnosis.examination import Diagnosis, examine
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.rollout_files import EVALUATION, TEXT, TRAINING, read_table, rollout_files
from rpt_jax.infra.run_format import FORMAT, METRICS
from rpt_jax.infra.scaling_laws import NotDetermined, fit_power_law
from rpt_jax.infra.workdir import RESULT, RUN_CONFIG

MAX_POINTS = 1000  # Of a curve.
RESPONSE_CHARACTERS = 4000  # Shown of the reasoning; the middle of a longer one is left out.
# Characters of the page that rollouts and text may take, shared by its runs.
ROLLOUT_CHARACTERS = 2_000_000
EVALUATION_CHARACTERS = 1_800_000
_CHARACTERS_PER_ROLLOUT = 120  # Of a row in the page beside its texts.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # Of a file that is damaged, or lacks a column or values.
_PROMPT = ("step", "split", "source", "window", "position")  # What the rollouts of a prompt have in common.
_SHOWN = ("sample", "status", "reward", "length", "logprob", "reasoning", "answer", "prediction")

Group = dict[str, Any]


@dataclasses.dataclass
class RunData:
    """What the page shows of a run, as JSON values.

    Attributes:
      name: of its directory.
      problems: sentences on what cannot be shown.
      version: of rpt_jax that wrote it; "" if unknown.
      command: that the run was started with.
      config: value of each field.
      changed: fields that differ from their defaults.
      result: content of result.json; empty for a run that is not finished.
      metrics: for each key, the steps and the values.
      fits: for each difficulty, its evaluations and the power law through them.
      groups: rollouts of training steps and of the first and the last evaluation, by prompt.
      windows: evaluated text.
      left_out: sentences on what is in the run directory, but not on the page.
      diagnosis: what the rules of `rpt_jax.diagnosis` say; None if the run cannot be examined.
    """

    name: str
    problems: list[str] = dataclasses.field(default_factory=list)
    version: str = ""
    command: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    changed: list[str] = dataclasses.field(default_factory=list)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, tuple[list[int], list[float]]] = dataclasses.field(default_factory=dict)
    fits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    groups: list[Group] = dataclasses.field(default_factory=list)
    windows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    diagnosis: Diagnosis | None = None

    @property
    def last_step(self) -> int:
        """The last step in the metrics; -1 without metrics."""
        return max((steps[-1] for steps, _ in self.metrics.values()), default=-1)

    def first_and_last(self, key: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
        """Return (step, value) of the first and of the last line with a metric; None if no line has it."""
        steps, values = self.metrics.get(key, ([], []))
        return ((steps[0], values[0]), (steps[-1], values[-1])) if steps else None


def read_run(workdir: Path, runs: int = 1) -> RunData:
    """Read the run in a directory. Never raises for the content of its files.

    Args:
      workdir: directory of the run.
      runs: number of runs on the page, which share its size.
    """
    run = RunData(name=workdir.resolve().name)
    _read_config(run, workdir)
    _read_result(run, workdir)
    _read_metrics(run, workdir)
    _read_training(run, workdir, ROLLOUT_CHARACTERS // runs)
    _read_evaluations(run, workdir, EVALUATION_CHARACTERS // runs)
    with contextlib.suppress(UserError):  # What cannot be read is named in `problems` already.
        run.diagnosis = examine(workdir)
    return run


# --- config, result and metrics ----------------------------------------------------------------------


def _read_json(run: RunData, path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty, with a sentence in `problems`, if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        run.problems.append(f"{path.name} is damaged: it does not hold an object.")
    except FileNotFoundError:
        run.problems.append(f"{path.name} is missing.")
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"{path.name} cannot be read ({error}).")
    return {}


def _read_config(run: RunData, workdir: Path) -> None:
    content = _read_json(run, workdir / RUN_CONFIG)
    run.version = str(content.get("version", ""))
    run.command = str(content.get("command", ""))
    config = content.get("config")
    run.config = config if isinstance(config, dict) else {}
    if content and content.get("format") != FORMAT:
        run.problems.append(
            f"The run has format {content.get('format')}, written by rpt_jax {run.version or 'of an unknown version'}; this "
            f"version reads format {FORMAT}. What follows may be incomplete."
        )
    defaults = dict(leaves(Experiment()))
    run.changed = [name for name, value in run.config.items() if value != defaults.get(name, value)]


def _read_result(run: RunData, workdir: Path) -> None:
    if (workdir / RESULT).exists():
        run.result = _read_json(run, workdir / RESULT)
        seconds = run.result.get("wall_seconds", 0.0)
        if not isinstance(seconds, int | float):
            run.problems.append(f"{RESULT}: wall_seconds={seconds!r} is not a number.")
            del run.result["wall_seconds"]


def _read_metrics(run: RunData, workdir: Path) -> None:
    try:
        lines = read_metrics(workdir / METRICS)
    except UserError as error:
        run.problems.append(str(error))
        lines = []
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step":
                steps, values = columns.setdefault(key, ([], []))
                steps.append(int(line["step"]))
                values.append(float(f"{value:.6g}"))
    run.fits = list(_fits(lines))
    run.metrics = {key: _thinned(*columns[key]) for key in sorted(columns)}


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return at most `MAX_POINTS` points, equally spaced, among them the first and the last."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    kept = np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int)
    return [steps[i] for i in kept], [values[i] for i in kept]


def _rounded(value: float, digits: int) -> float | None:
    """Return a number with some significant digits; None for what JSON has no number for."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _fits(lines: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield the evaluations after the first step by difficulty, with the power law that they determine."""
    for level in DIFFICULTIES:
        key = f"eval/reasoning/{level}"
        points = [
            (line["flops/train_total"], line[key]) for line in lines if key in line and "flops/train_total" in line
        ]
        points = [(flops, accuracy) for flops, accuracy in points if flops > 0]
        if not points:
            continue
        flops, accuracy = map(list, zip(*points, strict=True))
        before = next((line[key] for line in lines if line["step"] == 0 and key in line), None)
        fit: dict[str, Any] = {"level": level, "flops": flops, "accuracy": accuracy, "before": before, "curve": None}
        law = fit_power_law(flops, accuracy)
        curve = law.closest if isinstance(law, NotDetermined) else law
        if curve:
            curve_M = np.geomspace(min(flops), max(flops), 60)
            fit["curve"] = {"flops": curve_M.tolist(), "accuracy": curve(curve_M).tolist()}
            fit["law"] = dataclasses.asdict(curve)
        if isinstance(law, NotDetermined):
            fit["reason"] = law.reason
        yield fit


# --- rollouts ------------------------------------------------------------------------------------------


def _read_training(run: RunData, workdir: Path, characters: int) -> None:
    """Read rollouts of training steps: all, or equally many of equally spaced steps, as many as the page has room for."""
    files = rollout_files(workdir, TRAINING)
    if not files:
        run.problems.append("No rollouts of training steps were kept.")
        return

    # See which groups there are, and how long a rollout is.
    prompts_of: dict[int, int] = {}
    rows = size = 0
    readable = []
    for path in files.values():
        try:
            keys = read_table(path, ["step", "prompt", "length"])
            steps_N, prompts_N, lengths_N = (keys[name].to_numpy() for name in ("step", "prompt", "length"))
        except _UNREADABLE as error:
            run.problems.append(f"{path.name} cannot be read ({error}).")
            continue
        readable.append(path)
        for step in np.unique(steps_N):
            prompts_of[int(step)] = int(prompts_N[steps_N == step].max()) + 1
        rows += keys.num_rows
        # A token has about four characters.
        characters_N = np.minimum(4 * lengths_N.astype(np.int64), RESPONSE_CHARACTERS)
        size += int(characters_N.sum()) + keys.num_rows * _CHARACTERS_PER_ROLLOUT
    total = sum(prompts_of.values())
    if not total:
        return

    # Choose as many as there is room for.
    room = max(1, int(characters / (size / total)))
    steps = sorted(prompts_of)
    per_step = max(1, room // len(steps))
    if room < len(steps):
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, room).round().astype(int)]
    chosen = sum(min(per_step, prompts_of[step]) for step in steps)
    if chosen < total:
        run.left_out.append(f"{chosen:,} of {total:,} kept prompts of training steps are shown; all are in rollouts/.")
    filters = [("step", "in", set(steps)), ("prompt", "<", per_step)]
    for path in readable:
        run.groups += _read_groups(run, path, TRAINING, filters)


def _read_evaluations(run: RunData, workdir: Path, characters: int) -> None:
    """Read the rollouts of the first and of the last evaluation, and the text that both are about."""
    evaluations = rollout_files(workdir, EVALUATION)
    if not evaluations:
        run.problems.append("No rollouts of evaluations were kept.")
        return
    steps = {"before": min(evaluations)}
    if len(evaluations) > 1:
        steps["after"] = max(evaluations)
    groups: dict[str, list[Group]] = {}
    for name, step in steps.items():
        groups[name] = _read_groups(run, evaluations[step], name)

    # Show the same prompts of both, as many as there is room for: whole windows, if there are any.
    wanted: dict[tuple[Any, ...], int] = {}
    for group in itertools.chain.from_iterable(groups.values()):
        key = _unit(group)
        wanted[key] = wanted.get(key, 0) + _characters(group)
    windows = _windows(run, workdir, steps)
    shown = set()
    left = characters
    for key, size in wanted.items():
        left -= (
            size + sum(map(len, windows[key]["tokens"])) + 14 * len(windows[key]["tokens"]) if key in windows else size
        )
        if left < 0 and shown:
            break
        shown.add(key)
    if len(shown) < len(wanted):
        kind = "evaluated texts" if windows else "evaluated questions"
        run.left_out.append(f"{len(shown):,} of {len(wanted):,} {kind} are shown; all are in rollouts/.")
    run.groups += [group for name in groups for group in groups[name] if _unit(group) in shown]
    run.windows = [window for key, window in windows.items() if key in shown]


def _read_groups(run: RunData, path: Path, kind: str, filters: list[tuple[str, str, Any]] | None = None) -> list[Group]:
    """Return the groups of a file of rollouts; none, with a sentence in `problems`, if it is damaged or lacks a column."""
    try:
        return group_rollouts(read_table(path, filters=filters).to_pylist(), kind)
    except _UNREADABLE as error:
        run.problems.append(f"{path.name} cannot be read ({error}).")
        return []


def _read_rows(run: RunData, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a file; none, with a sentence in `problems`, if it is damaged or lacks one of the columns."""
    try:
        return read_table(path).select(columns).to_pylist()
    except _UNREADABLE as error:
        run.problems.append(f"{path.name} cannot be read ({error}).")
        return []


def _unit(group: Group) -> tuple[Any, ...]:
    """Return what is shown or left out as a whole: a window, or a question."""
    return (group["split"], group["window"] if group["window"] >= 0 else group["source"])


def group_rollouts(rows: Iterable[dict[str, Any]], kind: str) -> list[Group]:
    """Return the rollouts of each prompt together.

    Args:
      rows: of a file of rollouts, in its order.
      kind: "training", "before" or "after".
    """
    groups = []
    for _, of_prompt in itertools.groupby(rows, key=lambda row: [row[name] for name in _PROMPT]):
        samples = list(of_prompt)
        first = samples[0]
        groups.append(
            {
                "kind": kind,
                "step": first["step"],
                "split": first["split"],
                "source": first["source"],
                "window": first["window"],
                "position": first["position"],
                "entropy": _rounded(first["entropy"], 4),
                "context": first["context"],
                "truth": first["truth"],
                "samples": [
                    {name: sample[name] for name in _SHOWN}
                    | {
                        "reasoning": _shortened(sample["reasoning"]),
                        "reward": _rounded(sample["reward"], 4),
                        "logprob": _rounded(sample["logprob"], 3),
                    }
                    for sample in samples
                ],
            }
        )
    return groups


def _shortened(text: str) -> str:
    left_out = len(text) - RESPONSE_CHARACTERS
    if left_out <= 0:
        return text
    half = RESPONSE_CHARACTERS // 2
    return f"{text[:half]}\n[… {left_out:,} characters …]\n{text[-half:]}"


def _characters(group: Group) -> int:
    """Return about how many characters a group takes on the page."""
    samples = sum(len(s["reasoning"]) + len(s["answer"] or "") + _CHARACTERS_PER_ROLLOUT for s in group["samples"])
    return len(group["context"]) + samples


# --- text ----------------------------------------------------------------------------------------------


def _windows(run: RunData, workdir: Path, steps: Mapping[str, int]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the windows of the evaluated text, by split and number, with what was measured at each token."""
    files = rollout_files(workdir, TEXT)
    windows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, step in steps.items():
        if step not in files:
            continue
        rows = _read_rows(run, files[step], ("split", "window", "token", "entropy", "direct_correct"))
        for key, tokens in itertools.groupby(rows, key=lambda row: (row["split"], row["window"])):
            of_window = list(tokens)
            window = windows.setdefault(
                key,
                {
                    "split": key[0],
                    "window": key[1],
                    "tokens": list(token_texts(token["token"] for token in of_window)),
                    "entropy": [max(0.0, _rounded(token["entropy"], 3) or 0.0) for token in of_window],
                    "direct": {},
                },
            )
            window["direct"][name] = [int(token["direct_correct"]) for token in of_window]
    return windows


def token_texts(tokens: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of each token; a character that several tokens make up belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for token in tokens:
        yield decoder.decode(token)
