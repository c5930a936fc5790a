"""The command `rpt`: one name for the package's command-line tools."""

from __future__ import annotations

import runpy
import sys

from rpt_jax import __version__
from rpt_jax.errors import nearest
from rpt_jax.infra.command_line import run_command

# Subcommand: (module, summary). A module is imported only when its subcommand runs.
COMMANDS = {
    "train": ("rpt_jax.main", "run the task of a config: training, pre-training or corpus preparation"),
    "evaluate": ("rpt_jax.evaluate", "evaluate a policy: next tokens, questions, multiple choice; compare two"),
    "lm_eval": ("rpt_jax.lm_eval", "evaluate a policy with lm-evaluation-harness"),
    "convert": ("rpt_jax.convert", "import a policy from Hugging Face or GGUF, or export one"),
    "explain": ("rpt_jax.explain", "show what a policy makes of a text of yours: one HTML page, without training"),
    "report": ("rpt_jax.report", "write the page and the plots of a run, compare runs, watch a run"),
    "doctor": ("rpt_jax.doctor", "say what is wrong with a run, and which config fields to change"),
    "study": ("rpt_jax.study", "compare arms at the same budget: run them all, then one table and one page"),
    "preflight": ("rpt_jax.preflight", "compile a run for absent chips: does it fit, and what limits its speed"),
    "bench": ("rpt_jax.bench", "measure the speed of one part of the system on this machine"),
}


def usage() -> str:
    """Return the text of `rpt --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: rpt COMMAND [OPTION...]\n\n{commands}\n\n"
        "`rpt COMMAND --help` describes a command; `rpt --version` prints the version.\n"
        "`rpt train …` is the same as `python -m rpt_jax.main …`, and `rpt NAME …` as `python -m rpt_jax.NAME …`."
    )


def main(argv: list[str]) -> int:
    """Run the subcommand that the command line names, with the rest of the command line as its own.

    Returns: the exit code, unless the subcommand exits by itself.
    """
    command, *arguments = argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"error: rpt has no command '{command}'.{nearest(command, COMMANDS)} See rpt --help.", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    sys.argv = [f"rpt {command}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def console_main() -> None:
    """Run the command line of this process and exit."""
    run_command(main)


if __name__ == "__main__":
    console_main()
