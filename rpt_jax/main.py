"""python -m rpt_jax.main --config=configs/rpt_tiny.py [--workdir=DIR] [--describe] [--config.seed=1 …]

Loads and checks a config and runs its task. No logic of its own, so that everything can be imported and tested.

Exit codes: 0 complete, 2 something to mend (a sentence says what), 3 a number became NaN or infinite, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: one of configs/, or your own.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/<name of the config>_seed<seed>.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every size that follows from the config, and stop.")


def load_experiment(argv: list[str]) -> Experiment:
    """Parse the command line into a validated experiment. Raises: UserError, for whatever is wrong with it."""
    try:
        rest = flags.FLAGS(argv)
        config = _CONFIG.value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        # The libraries' own words, on one line: they name the flag or field, and the nearest one.
        raise UserError(" ".join(str(error.args[0] if error.args else error).split())) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}'; options begin with --.")
    if config is None:
        raise UserError("--config is missing: give a config file, such as --config=configs/rpt_tiny.py.")
    return from_config_dict(config.to_dict())


def run(experiment: Experiment, workdir: Path) -> None:
    """Run the experiment's task in `workdir`."""
    # Late imports: a mistyped flag should not wait for JAX.
    from rpt_jax import pretrain, train
    from rpt_jax.infra.checkpoint import claim_workdir
    from rpt_jax.infra.sharding import make_mesh, use_mesh

    mesh = make_mesh(experiment.mesh.data, experiment.mesh.fsdp, experiment.mesh.tensor)
    tasks = {"rpt": train.train, "pretrain": pretrain.pretrain}
    claim_workdir(workdir, experiment)
    with use_mesh(mesh):
        tasks[experiment.task](experiment, workdir, mesh)


def main(argv: list[str]) -> int:
    """Return the exit code."""
    try:
        experiment = load_experiment(argv)
        if _DESCRIBE.value:
            from rpt_jax.describe import print_description

            print_description(experiment)
            return 0
        name = Path(flags.FLAGS["config"].config_filename).stem
        run(experiment, Path(_WORKDIR.value or f"runs/{name}_seed{experiment.seed}"))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: a number is not finite at {error}. Nothing was saved after it.", file=sys.stderr)
        return 3
    except OSError as error:
        print(
            f"error: {error}. Mend it and run the same command again: it goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # Chatter of the libraries below would bury the one sentence that matters.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv))
