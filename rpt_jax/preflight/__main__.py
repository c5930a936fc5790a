"""python -m rpt_jax.preflight --config=FILE --topology=v5p:4x4x4 [--sweep] [--programs=A,B] [--json=FILE] [--config.a.b=v …]

Compiles the programs of a run for chips that are not present, and reports whether they fit, what data they move and what bounds
them. TPUs, such as v5e:4x4, v6e:8x8, v5p:4x4x4 or v4:2x2x4, need libtpu (`pip install "jax[tpu]"` in the range of
requirements.txt). GPUs, such as h100:8, are replaced by simulated CPU devices. JAX_OPTIMIZATION_LEVEL=O0 in the environment
compiles faster and optimizes less. Exit codes: 0 it fits, 2 it does not fit or the command is invalid.
"""

from __future__ import annotations

import argparse
import json
import sys

from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.config.loading import split_overrides
from rpt_jax.config.user_paths import check_folder, check_local_path, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.command_line import import_jax, run_command
from rpt_jax.preflight.topology import parse_topology, prepare_process


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    usage, _, description = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.preflight", description=description, usage=usage)
    parser.add_argument("--config", required=True, help="config file; --config.section.field=value overrides a field")
    parser.add_argument(
        "--topology", required=True, help="chips and their arrangement: v5p:4x4x4, v6e:8x8, v6e-64, h100:8"
    )
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--sweep", action="store_true", help="try meshes and numbers of decode slots and recommend one"
    )
    selection.add_argument(
        "--programs",
        type=lambda names: names.split(","),
        default=(),
        help="compile only these programs of a step, separated by commas: score, reshard, sample, reward, update, …",
    )
    parser.add_argument("--json", type=user_path, help="file to write all figures to")
    overrides, rest = split_overrides(argv[1:])
    options = parser.parse_args(rest)
    try:
        check_local_path("--json", options.json)
        check_folder("--json", options.json)
        topology = parse_topology(options.topology)
        prepare_process(topology)
        # JAX reads the environment that prepare_process sets. Checking a config imports JAX, too.
        import_jax()
        experiment = from_config_dict(load_config_file(options.config), overrides)
        from rpt_jax.infra.jax_settings import needed_jax_settings
        from rpt_jax.model.context_length import context_warnings
        from rpt_jax.preflight.report import preflight
        from rpt_jax.preflight.sweep import sweep
        from rpt_jax.sizes.policy import model_config_of

        for warning in context_warnings(experiment, model_config_of(experiment)[0]):
            print(f"warning: {warning}", file=sys.stderr)
        with needed_jax_settings():
            if options.sweep:
                result = sweep(experiment, topology)
            else:
                result = preflight(experiment, topology, options.programs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.field == "--json":
            return 2
        result = {"fits": False, "error": str(error)}
    if options.json:
        record = {"config": options.config, "overrides": overrides} | result
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if result["fits"] else 2


if __name__ == "__main__":
    run_command(main)
