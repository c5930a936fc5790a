"""python -m rpt_jax.bench NAME [options] [--json=FILE]

Measures one part of the system on this machine, prints a table and, with --json, writes the same figures to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rpt_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Return the exit code: 0, or 2 where a sentence says what to mend."""
    # The first line of XLA's chatter would land in the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from rpt_jax.bench import compilation, data, policy, reward, rollout, soak, update
    from rpt_jax.bench.measure import machine
    from rpt_jax.infra.console import table

    benches = {
        "rollout": rollout,
        "policy": policy,
        "compile": compilation,
        "reward": reward,
        "update": update,
        "data": data,
        "soak": soak,
    }
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.bench", description=__doc__.splitlines()[2])
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in benches.items():
        command = commands.add_parser(name, description=module.__doc__, help=module.__doc__.splitlines()[0])
        module.add_options(command)
        command.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(argv[1:])
    try:
        columns, rows = benches[options.name].measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    here = machine()
    table(f"bench {options.name}: {', '.join(f'{k} {v}' for k, v in here.items())}", columns, rows)
    if options.json:
        figures = [dict(zip(columns, row, strict=True)) for row in rows]
        arguments = {k: str(v) for k, v in vars(options).items()}
        content = {"machine": here, "options": arguments, "figures": figures} | (
            figures[0] if len(figures) == 1 else {}
        )
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
