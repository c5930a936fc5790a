"""python -m rpt_jax.bench NAME [options] [--json=FILE]

Measures one part of the system on this machine and prints a table; --json writes the same figures to a file.
"""

from __future__ import annotations

import argparse
import json
import sys

from rpt_jax.config.user_paths import check_folder, check_local_path, user_path
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.command_line import import_jax, run_command

# Options of earlier versions, and what they are called now.
_RENAMED = {
    "--max_new_tokens": "--max-new-tokens",
    "--stop_ids": "--stop-ids",
    "--slots": "--decode-slots",
    "--chunk": "--prefill-tokens (rollout) or --logit-chunk-tokens (policy, update)",
    "--beside": "--compare",
    "--context": "--prompt-tokens",
    "--response": "--response-tokens",
    "--documents": "--score-batch-windows",
    "--tokens": "--max-document-tokens",
}


def main(argv: list[str]) -> int:
    """Run the command and return the exit code: 0, or 2 after a user error."""
    try:
        return run_bench(argv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR


def run_bench(argv: list[str]) -> int:
    """Parse the command line, measure, and show the figures. Raises: UserError or OSError."""
    import_jax()
    from rpt_jax.bench import compilation, data, policy, reward, rollout, routing, soak, update
    from rpt_jax.bench.device import command as device
    from rpt_jax.bench.measure import machine
    from rpt_jax.infra.console import table
    from rpt_jax.infra.jax_settings import check_platforms, needed_jax_settings

    # One subcommand for each bench, with the options that its module adds.
    benches = {
        "rollout": rollout,
        "policy": policy,
        "compile": compilation,
        "reward": reward,
        "update": update,
        "routing": routing,
        "data": data,
        "soak": soak,
        "device": device,
    }
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.bench", description=description)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in benches.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, description=module.__doc__, help=summary)
        module.add_options(command)
        command.add_argument("--json", type=user_path, help="file to write the figures to")
    options, unknown = parser.parse_known_args(argv[1:])
    for argument in unknown:
        name = argument.partition("=")[0]
        if name in _RENAMED:
            parser.error(f"{name} was renamed to {_RENAMED[name]}")
    if unknown:
        parser.error(f"unknown option: {unknown[0]}")

    # Measure, and show the figures next to the machine that they depend on.
    for name, value in vars(options).items():
        check_local_path(f"--{name}", value)
    check_folder("--json", options.json)
    if options.name == "device":
        return device.run(options)  # It measures in other processes, and writes the file as it goes.
    check_platforms()
    with needed_jax_settings():
        columns, rows = benches[options.name].measure(options)
    conditions = machine()
    table(f"bench {options.name}: {', '.join(f'{k} {v}' for k, v in conditions.items())}", columns, rows)

    # Write them to a file: one record per row, and the figures of a single row at the top level too.
    if options.json:
        figures = [dict(zip(columns, row, strict=True)) for row in rows]
        arguments = {k: str(v) for k, v in vars(options).items()}
        record = {"machine": conditions, "options": arguments, "figures": figures}
        if len(figures) == 1:
            record |= figures[0]
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return ExitCode.COMPLETE


if __name__ == "__main__":
    run_command(main)
