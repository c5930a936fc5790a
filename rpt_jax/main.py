"""Train, pre-train or score, as a config file says.

    python -m rpt_jax.main --config=configs/rpt_tiny.py [--workdir=DIR] [--describe] [--config.seed=1 ...]

The same command resumes an interrupted run from its latest checkpoint. Exit codes:

    0     complete
    1     a bug; the traceback was printed, and the same command would fail again
    2     something to fix; the message says what
    3     a metric became NaN or infinite; rerun with --replay to locate the operation
    4     a rule of config section `divergence` stopped the run
    75    interrupted by a stop signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2), or another process was lost; rerun the same
          command to resume
    130, 143  stopped at once by a second SIGINT or SIGTERM; rerun the same command to resume
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from rpt_jax.config import Experiment, from_config_dict, load_config_file
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.loading import split_overrides
from rpt_jax.config.user_paths import check_local_path, check_location
from rpt_jax.distributed.hosts import find_hosts
from rpt_jax.distributed.rendezvous import Heartbeat, connect_processes
from rpt_jax.errors import ExitCode, UserError, check_choice, nearest
from rpt_jax.infra.command_line import import_jax, run_command
from rpt_jax.infra.console import console_logging, silent_console
from rpt_jax.infra.gpu_settings import exclude_nondeterministic_operations
from rpt_jax.infra.remote_workdir import local_workdir
from rpt_jax.infra.signals import StopSignals
from rpt_jax.infra.storage import fetch_inputs, with_urls

if TYPE_CHECKING:
    from rpt_jax.infra.run_context import RunContext

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file: one of configs/ or your own. Override a field of it with --config.SECTION.FIELD=VALUE.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run, or its URL in object storage. Default: runs/<name of the config>_seed<seed>.",
)
_FORCE = flags.DEFINE_bool("force", False, "Resume in a workdir whose run had another config.")
_REPLAY = flags.DEFINE_bool(
    "replay", False, "Repeat the step that exit code 3 reported, with NaN checks, and stop at the operation at fault."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0 if the run has several processes. Process 0 listens on this port and the next one. Not needed under "
    "Slurm, on the hosts of a TPU slice in GKE, or where JAX's own variables are set.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes; requires --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0; requires --coordinator.")
_JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds", 300.0, "Seconds that processes wait for each other at startup.", lower_bound=1.0
)
_STALL_SECONDS = flags.DEFINE_float(
    "stall_seconds", 3600.0, "Exit if no process makes progress for this many seconds.", lower_bound=1.0
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory for compiled programs, which later runs load instead of compiling them again; 'off' for none. Default: rpt_jax in "
    "your cache directory.",
)
_DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "On a GPU, use only operations that give the same bits in every run, which may be slower. A CPU or TPU has no others.",
)
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every size that the config implies, and exit.")
_FLAGS = (
    _CONFIG,
    _WORKDIR,
    _DESCRIBE,
    _FORCE,
    _REPLAY,
    _COORDINATOR,
    _PROCESSES,
    _PROCESS,
    _JOIN_SECONDS,
    _STALL_SECONDS,
    _COMPILATION_CACHE,
    _DETERMINISTIC,
)


def help_text() -> str:
    """Return the description of the command and of its flags."""
    lines = [str(__doc__), "Flags:", ""]
    for flag in _FLAGS:
        default = "" if flag.default in (None, False) else f" Default: {flag.default:g}."
        text = textwrap.fill(
            f"{flags.FLAGS[flag.name].help}{default}", 96, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
        lines += [f"    --{flag.name}", text]
    return "\n".join(lines)


def unknown_flag(name: str) -> UserError:
    """Return the error for a flag that does not exist, with the config field or the flag that may be meant."""
    hint = field_hint(name) or nearest(f"--{name}", [f"--{flag.name}" for flag in _FLAGS])
    return UserError(f"unknown flag --{name}.{hint} See --help.", field=f"--{name}")


def field_hint(argument: str) -> str:
    """Return a hint if `argument` names a config field without the --config. that belongs in front of it."""
    name = argument.lstrip("-").removeprefix("config.").partition("=")[0]
    return f" Did you mean --config.{name}=VALUE?" if name in dict(leaves(Experiment())) else ""


def _expected_value(flag: str) -> str:
    """Return what the value of a flag, such as "--processes", must be."""
    parser = flags.FLAGS[flag.removeprefix("--")].parser
    if isinstance(parser, flags.BooleanParser):
        return "true or false"
    kind = "an integer" if isinstance(parser, flags.IntegerParser) else "a number"
    least = getattr(parser, "lower_bound", None)
    return kind if least is None else f"{kind}, at least {least:g}"


def load_experiment(argv: list[str]) -> Experiment:
    """Parse the command line into a validated experiment. Raises: UserError, for invalid flags or config values."""
    overrides, others = split_overrides(argv)
    for flag in _FLAGS:
        flags.FLAGS[flag.name].unparse()  # A value that an earlier call in this process was given.
    try:
        rest = flags.FLAGS(others)
    except flags.UnrecognizedFlagError as error:
        raise unknown_flag(error.flagname) from None
    except flags.Error as error:
        # absl's text is "flag --NAME=VALUE: REASON", or "Missing value for flag --NAME."
        given, _, reason = str(error).removeprefix("flag ").partition(": ")
        flag = re.search(r"--\w+", given)
        if flag is None:  # A file that --flagfile names is missing.
            raise UserError(str(error), field="--flagfile") from None
        raise UserError(f"{given} must be {_expected_value(flag[0])}." if reason else given, field=flag[0]) from None
    for flag in _FLAGS:
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            name = f"--{flag.name}"
            raise UserError(f"{name}={flag.value} must be {_expected_value(name)}.", field=name)
    if len(rest) > 1:
        raise UserError(
            f"unexpected argument '{rest[1]}': write --NAME=VALUE, without a space around '='.{field_hint(rest[1])}",
            field=rest[1],
        )
    if _CONFIG.value is None:
        raise UserError(
            "--config is missing: give a config file, such as --config=configs/rpt_tiny.py.", field="--config"
        )
    check_location("--workdir", _WORKDIR.value)
    check_local_path("--compilation_cache", _COMPILATION_CACHE.value)
    import_jax()  # The registered choices, which the config is checked against, load it.
    return from_config_dict(load_config_file(_CONFIG.value), overrides)


def run(
    experiment: Experiment,
    workdir: Path,
    *,
    force: bool = False,
    replay: bool = False,
    context: RunContext | None = None,
) -> None:
    """Run the task of an experiment.

    Args:
      experiment: the config. Files at URLs are copied to the local disk first.
      workdir: directory of the run; a run that is there is resumed.
      force: resume even if the run in `workdir` had another config.
      replay: repeat the step in which a number was not finite, with NaN checks.
      context: signals, heartbeats and other processes; None for a single process without signal handlers.

    Raises:
      UserError: the config, the files that it names or the workdir cannot be used.
    """
    # Imported here, so that a mistyped flag is reported before JAX is loaded.
    import jax

    from rpt_jax import difficulty, pretrain, score, traces, train
    from rpt_jax.diagnosis.examination import log_verdict
    from rpt_jax.distributed.mesh import use_mesh
    from rpt_jax.distributed.processes import is_leader
    from rpt_jax.infra.compilation_progress import CompilationProgress
    from rpt_jax.infra.jax_settings import check_platforms, needed_jax_settings
    from rpt_jax.infra.out_of_memory import explain_out_of_memory
    from rpt_jax.infra.run_context import RunContext
    from rpt_jax.infra.workdir import claimed_workdir
    from rpt_jax.setup import make_run_mesh
    from rpt_jax.sizes.plan import plan_run
    from rpt_jax.startup import check_start, log_start

    # Check what costs nothing, then set up the devices and the workdir.
    if replay:
        check_choice("--replay: task", experiment.task, ["rpt", "rft", "pretrain"])
    context = context or RunContext()
    check_platforms()
    given = experiment
    experiment = fetch_inputs(experiment)
    mesh = make_run_mesh(experiment)
    check_start(experiment, workdir, mesh)
    with (
        needed_jax_settings(),
        claimed_workdir(workdir, given, force),
        use_mesh(mesh, experiment.mesh.split_rows),
        context.compile_times,
        CompilationProgress(),
        jax.debug_nans(replay),
        jax.debug_infs(replay),
        explain_out_of_memory("loading or evaluation", {"mesh.fsdp": experiment.mesh.fsdp}),
    ):
        log_start(experiment, workdir)
        experiment = plan_run(experiment, mesh)
        if experiment.reinforces:
            train.train(experiment, workdir, mesh, context, replay=replay)
        elif experiment.task == "pretrain":
            pretrain.pretrain(experiment, workdir, mesh, context, replay=replay)
        elif experiment.task == "score":
            score.score(experiment, workdir, mesh, context)
        elif experiment.task == "difficulty":
            difficulty.measure(experiment, workdir, mesh, context)
        else:
            traces.sample_traces(experiment, workdir, mesh, context)
        if experiment.trains and not replay and is_leader():
            log_verdict(workdir)


def run_with_processes(experiment: Experiment, location: str) -> None:
    """Call `run` as the flags say, as one process of possibly several, with stop signals handled.

    Args:
      experiment: a validated config.
      location: path or URL of the workdir.

    Raises:
      UserError: as `run` does, or another process is missing or was started with another config.
    """
    hosts = find_hosts(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, os.environ)
    # All processes must agree on these.
    facts = {
        "--workdir": location,
        "--replay": _REPLAY.value,
        "--deterministic": _DETERMINISTIC.value,
        "jax": version("jax"),
        **dict(leaves(experiment)),
    }
    if _DETERMINISTIC.value:
        exclude_nondeterministic_operations(os.environ)
    signals = StopSignals(experiment.checkpoint.grace_seconds)
    heartbeat = Heartbeat()
    connected = connect_processes(hosts, facts, heartbeat, _JOIN_SECONDS.value, _STALL_SECONDS.value)
    is_silent = hosts is not None and hosts.process > 0
    with signals.handle(), connected as rendezvous, silent_console() if is_silent else contextlib.nullcontext():
        from rpt_jax.infra.compilation_cache import chosen_directory, compilation_cache
        from rpt_jax.infra.run_context import RunContext

        if rendezvous:
            signals.on_exit = rendezvous.announce_exit
        context = RunContext(signals=signals, heartbeat=heartbeat, rendezvous=rendezvous)
        try:
            with (
                compilation_cache(chosen_directory(_COMPILATION_CACHE.value)),
                local_workdir(
                    location,
                    signals,
                    process=hosts.process if hosts else 0,
                    is_shared=experiment.task == "score",
                ) as workdir,
            ):
                run(experiment, workdir, force=_FORCE.value, replay=_REPLAY.value, context=context)
        except (Exception, KeyboardInterrupt) as error:
            if rendezvous:
                code, message = exit_code_and_message(error)
                rendezvous.exit_all(code, message)
            raise


def describe(experiment: Experiment) -> None:
    """Print every size that the config implies. Raises: UserError, also for a config that no machine can run."""
    from rpt_jax.describe import print_description
    from rpt_jax.infra.jax_settings import check_platforms
    from rpt_jax.pretrain import check_vocab_size
    from rpt_jax.setup import check_random_weights, starts_with_pretraining

    check_platforms()
    # A run refuses these on every machine.
    check_random_weights(experiment)
    if starts_with_pretraining(experiment):
        check_vocab_size(experiment)
    print_description(experiment)


def main(argv: list[str]) -> int:
    """Run the command line `argv`; return the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return ExitCode.COMPLETE
    try:
        experiment = load_experiment(argv)
        if _DESCRIBE.value:
            with console_logging():
                describe(experiment)
            return ExitCode.COMPLETE
        location = _WORKDIR.value or f"runs/{Path(str(_CONFIG.value)).stem}_seed{experiment.seed}"
        with console_logging():
            run_with_processes(experiment, location)
        return ExitCode.COMPLETE
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - each kind of exception has its exit code.
        code, message = exit_code_and_message(error)
        print(with_urls(message), file=sys.stderr)
        return code


def exit_code_and_message(error: BaseException) -> tuple[int, str]:
    """Return the exit code for the exception that ended a run, and the message to print."""
    from rpt_jax.infra.divergence import Diverged

    if isinstance(error, UserError):
        return error.code, f"error: {error}"
    if isinstance(error, FloatingPointError):
        return ExitCode.NOT_FINITE, (
            f"error: non-finite metric at {error}. The update was skipped and the state saved; rerun with --replay to locate "
            "the operation."
        )
    if isinstance(error, Diverged):
        return ExitCode.DIVERGED, f"error: the run diverged at {error}. The latest checkpoint is from before that."
    if isinstance(error, OSError):
        return ExitCode.USER_ERROR, (
            f"error: {error}. Fix this and rerun the same command to resume from the latest checkpoint."
        )
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "stopped. Rerun the same command to resume from the latest checkpoint."
    return ExitCode.BUG, "".join(traceback.format_exception(error)).rstrip()


def report_unless_late(report: Callable[[Any], object], failure: Any) -> None:
    """Report an exception that Python cannot raise, unless it is asyncio's in a thread of orbax after a write has failed.

    The text is CPython's ("Event loop is closed", checked with Python 3.11 to 3.13).

    Args:
      report: `sys.unraisablehook` or `threading.excepthook`.
      failure: its argument.
    """
    if str(failure.exc_value) != "Event loop is closed":
        report(failure)


def console_main() -> None:
    """Run the command line of this process and exit."""
    # Hide the log of the libraries: a failure in one of them also raises an exception, whose message is printed.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = functools.partial(report_unless_late, sys.unraisablehook)
    threading.excepthook = functools.partial(report_unless_late, threading.excepthook)
    run_command(main)


if __name__ == "__main__":
    console_main()
