"""python -m rpt_jax.preflight --config=configs/rpt_14b.py --topology=v5p:4x4x4 [--sweep] [--json=FILE] [--config.a.b=v …]

Compiles the programs of a run for chips that are not here, and says whether they fit, what they move and what bounds them.
TPUs, such as v5e:4x4, v6e:8x8, v5p:4x4x4, v4:2x2x4, need libtpu (`pip install "jax[tpu]"` of the range in requirements.txt); for
GPUs, such as h100:8, as many simulated CPU devices are compiled for in their place. JAX_OPTIMIZATION_LEVEL=O0 in the environment
compiles faster, and less well. Exit codes: 0 it fits, 2 something to mend: a sentence says what.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.errors import UserError
from rpt_jax.preflight.topology import parse_topology, prepare_process

_OVERRIDE = "--config."


def main(argv: list[str]) -> int:
    """Return the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.preflight", description=details, usage=summary)
    parser.add_argument(
        "--config", required=True, help="config file; --config.section.field=value changes a field of it"
    )
    parser.add_argument("--topology", required=True, help="chips and how they are arranged: v5p:4x4x4, v6e:8x8, h100:8")
    parser.add_argument(
        "--sweep", action="store_true", help="try meshes and numbers of decode slots, and recommend one"
    )
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    overrides = [argument.removeprefix(_OVERRIDE) for argument in argv[1:] if argument.startswith(_OVERRIDE)]
    options = parser.parse_args([argument for argument in argv[1:] if not argument.startswith(_OVERRIDE)])
    try:
        experiment = from_config_dict(load_config_file(options.config), overrides)
        topology = parse_topology(options.topology)
        prepare_process(topology)
        # Late, because what libtpu reads must be set before.
        from rpt_jax.preflight.report import preflight
        from rpt_jax.preflight.sweep import sweep

        result = (sweep if options.sweep else preflight)(experiment, topology)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        result = {"fits": False, "error": str(error)}
    if options.json:
        options.json.write_text(
            json.dumps({"config": options.config, "overrides": overrides} | result, indent=2) + "\n"
        )
    return 0 if result["fits"] else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
