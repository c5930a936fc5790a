"""python -m rpt_jax.main --config=configs/rpt_tiny.py [--workdir=DIR] [--describe] [--config.seed=1 …]

Loads and checks a config and runs its task. No logic of its own, so that everything can be imported and tested.

Exit codes: 0 complete; 75 stopped by SIGTERM or SIGINT with everything saved, and 128 + the signal's number where a second one
ended it at once: start the same command again. 2 something to mend (a sentence says what), 3 a number became NaN or infinite,
4 a rule of section divergence stopped the run, 1 a bug: again would end alike.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

from absl import flags

from rpt_jax.config import Experiment, from_config_dict, load_config_file
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.distributed.hosts import find_hosts
from rpt_jax.distributed.rendezvous import end_all, joined
from rpt_jax.errors import UserError, check_choice
from rpt_jax.infra.signals import stops_on_signals

_OVERRIDE = "--config."
_CONFIG = flags.DEFINE_string(
    "config", None, "Config file: one of configs/, or your own. --config.section.field=value changes a field of it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/<name of the config>_seed<seed>.")
_FORCE = flags.DEFINE_bool("force", False, "Go on in a workdir although its config was another one.")
_REPLAY = flags.DEFINE_bool(
    "replay", False, "Run the step again in which a number was not finite, and stop at the operation that makes it."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, which listens there and on the next port, where a run has several processes. "
    "Slurm, a TPU's hosts on Kubernetes and JAX's own variables say it themselves.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many processes the run has.")
_PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: which of them this one is, from 0.")
_JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds", 300.0, "How long processes wait for each other at the start.", lower_bound=1.0
)
_STALL_SECONDS = flags.DEFINE_float(
    "stall_seconds", 3600.0, "How long none of several processes may come any further; all end then.", lower_bound=1.0
)
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every size that follows from the config, and stop.")


def load_experiment(argv: list[str]) -> Experiment:
    """Parse the command line into a validated experiment. Raises: UserError, for whatever is wrong with it."""
    overrides = [argument.removeprefix(_OVERRIDE) for argument in argv if argument.startswith(_OVERRIDE)]
    try:
        rest = flags.FLAGS([argument for argument in argv if not argument.startswith(_OVERRIDE)])
    except flags.Error as error:
        raise UserError(f"{error}. (A field of the config is set by {_OVERRIDE}section.field=value.)") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}'; options begin with --, and values follow a =.")
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a config file, such as --config=configs/rpt_tiny.py.")
    return from_config_dict(load_config_file(_CONFIG.value), overrides)


def run(experiment: Experiment, workdir: Path, force: bool = False, replay: bool = False) -> None:
    """Run the experiment's task in `workdir`; `force` as in `claimed_workdir`, `replay` as in `train`. Raises: UserError."""
    # Late imports: a mistyped flag should not wait for JAX.
    import jax

    from rpt_jax import pretrain, score, train
    from rpt_jax.distributed.mesh import use_mesh
    from rpt_jax.infra.workdir import claimed_workdir
    from rpt_jax.setup import start_mesh

    tasks = {"rpt": train.train, "pretrain": pretrain.pretrain, "score": score.prepare_corpus}
    if replay:
        check_choice("--replay: task", experiment.task, ["rpt", "pretrain"])
        tasks = {name: functools.partial(task, replay=True) for name, task in tasks.items()}
    mesh = start_mesh(experiment)
    in_mesh = use_mesh(mesh, experiment.mesh.split_rows)
    with claimed_workdir(workdir, experiment, force), in_mesh, jax.debug_nans(replay), jax.debug_infs(replay):
        tasks[experiment.task](experiment, workdir, mesh)


def run_until_stopped(experiment: Experiment, workdir: Path) -> None:
    """`run` with the flags of the command line, as one of the processes that they name, and with signals that save it."""
    hosts = find_hosts(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, os.environ)
    facts = {"--workdir": str(workdir), "--replay": _REPLAY.value, "jax": version("jax"), **dict(leaves(experiment))}
    meeting = joined(hosts, facts, _JOIN_SECONDS.value, _STALL_SECONDS.value)
    with stops_on_signals(experiment.checkpoint.grace_seconds), meeting:
        run(experiment, workdir, _FORCE.value, _REPLAY.value)


def main(argv: list[str]) -> int:
    """Return the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__, flags.FLAGS.main_module_help(), sep="\n")
        return 0
    try:
        experiment = load_experiment(argv)
        if _DESCRIBE.value:
            from rpt_jax.describe import print_description

            print_description(experiment)
            return 0
        # The shell leaves the ~ of --workdir=~/runs as it is.
        workdir = Path(_WORKDIR.value or f"runs/{Path(_CONFIG.value).stem}_seed{experiment.seed}").expanduser()
        run_until_stopped(experiment, workdir)
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever ends one of several processes ends all.
        code, text = ending(error)
        end_all(code, text)
        print(text, file=sys.stderr)
        return code


def ending(error: BaseException) -> tuple[int, str]:
    """Return the exit code of what ended a run, and what to say of it."""
    from rpt_jax.infra.divergence import Diverged

    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, FloatingPointError):
        return 3, (
            f"error: a number is not finite at {error}. The step changed nothing; --replay runs it again, with checks on."
        )
    if isinstance(error, Diverged):
        return 4, f"error: the run diverged at {error}. The last checkpoint is from before."
    if isinstance(error, OSError):
        return 2, f"error: {error}. Mend it and run the same command again: it goes on from the last checkpoint."
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped. The same command goes on from the last checkpoint."
    return 1, "".join(traceback.format_exception(error)).rstrip()


def without_late_writes(failure: sys.UnraisableHookArgs) -> None:
    """Show what nobody can catch, but for the writes of a checkpoint that come after one that failed."""
    if str(failure.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(failure)


if __name__ == "__main__":
    # Chatter of the libraries below would bury the one sentence that matters.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # What fails there fails here too, and is said once.
    sys.unraisablehook = without_late_writes
    exit_code = main(sys.argv)
    sys.stdout.flush()
    if exit_code == 2:
        os._exit(exit_code)  # At a normal exit libraries would write once more to what could not be written.
    sys.exit(exit_code)
