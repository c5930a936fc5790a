"""Evaluate a policy, or compare finished evaluations.

    python -m rpt_jax.evaluate --config=FILE --policy=POLICY --suite=NAME [--workdir=DIR] [--config.SECTION.FIELD=VALUE ...]
    python -m rpt_jax.evaluate --suite=compare|patterns --results=DIR,DIR [--workdir=DIR]

Suites that run a policy:

    next_token                  next-token accuracy at positions of a corpus, directly and by reasoning
    altered_reasoning           the same, and after reasoning that is emptied, shuffled, or of another document
    questions                   questions with a verifier: avg@k and pass@k
    multiple_choice             zero-shot, by reasoning: the letter in a box
    multiple_choice_likelihood  without reasoning: the most likely letter, and the most likely option

Suites that read the --workdir of two finished evaluations:

    compare                     paired differences of two policies on the same questions
    patterns                    keywords of reasoning in the responses of each

An evaluation writes evaluation.json, a table, and records.jsonl with a line for each question or position. The same command
resumes an evaluation that was interrupted. Exit codes: 0 complete, 2 something to fix, 75 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rpt_jax.config.user_paths import check_local_path, check_location
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.command_line import command_parser, import_jax, run_command
from rpt_jax.infra.storage import LARGE_FOLDERS, fetch, fetch_inputs, with_urls


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags; overrides of config fields are no flags."""
    parser = command_parser("evaluate", __doc__ or "")
    parser.add_argument("--suite", help="what to evaluate, by name")
    parser.add_argument("--config", help="config file; it names the corpus or the questions, and how prompts are made")
    parser.add_argument(
        "--policy",
        default="",
        help="policy to evaluate: a Hugging Face directory, a .gguf file, or a run; default: the config's policy.path",
    )
    parser.add_argument("--results", default="", help="the --workdir of two finished evaluations, separated by a comma")
    parser.add_argument(
        "--workdir", help="directory of the results, or its URL; default: runs/evaluate_<config>_<suite>"
    )
    parser.add_argument(
        "--compilation_cache",
        help="directory for compiled programs, which later runs load; 'off' for none; default: rpt_jax in your cache directory",
    )
    parser.add_argument("--restart", action="store_true", help="delete the results that are in the workdir")
    return parser


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    from rpt_jax.config.loading import split_overrides

    overrides, others = split_overrides(argv)
    options = make_parser().parse_args(others[1:])
    try:
        for flag in ("policy", "workdir", "results"):
            check_location(f"--{flag}", getattr(options, flag))
        check_local_path("--compilation_cache", options.compilation_cache)
        import_jax()
        from rpt_jax.evaluation.suite import SUITES
        from rpt_jax.infra.console import console_logging

        if options.suite is None:
            names = ", ".join(sorted(choice.name for choice in SUITES.choices()))
            raise UserError(f"--suite is missing: give one of {names}.", field="--suite")
        SUITES.check(options.suite)
        with console_logging():
            if SUITES[options.suite].requirements.policy:
                _evaluate(options, overrides)
            else:
                _read_results(options, overrides)
    except (UserError, OSError) as error:
        print(with_urls(f"error: {error}"), file=sys.stderr)
        return ExitCode.USER_ERROR
    return ExitCode.COMPLETE


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Run a suite on a policy. Raises: UserError."""
    from rpt_jax.config import from_config_dict, load_config_file
    from rpt_jax.distributed.mesh import use_mesh
    from rpt_jax.evaluation.run import check_task, evaluate
    from rpt_jax.infra.compilation_cache import chosen_directory, compilation_cache
    from rpt_jax.infra.compilation_progress import CompilationProgress
    from rpt_jax.infra.jax_settings import check_platforms, needed_jax_settings
    from rpt_jax.infra.out_of_memory import explain_out_of_memory
    from rpt_jax.infra.remote_workdir import local_workdir
    from rpt_jax.infra.run_context import RunContext
    from rpt_jax.infra.signals import StopSignals
    from rpt_jax.setup import find_policy, mesh_from_config

    if options.config is None:
        raise UserError(f"--config is missing: --suite={options.suite} needs a config file.", field="--config")
    if options.results:
        raise UserError(
            f"--results has no effect with --suite={options.suite}, which runs a policy.", field="--results"
        )
    experiment = fetch_inputs(from_config_dict(load_config_file(options.config), overrides, options.suite))
    check_task(options.suite, experiment)
    policy_field = "--policy" if options.policy else "policy.path"
    policy = experiment.policy.path
    if options.policy:
        policy = str(fetch(options.policy, policy_field, skip=LARGE_FOLDERS))
    if not policy:
        raise UserError("--policy is missing, and policy.path of the config is empty: give a policy.", field="--policy")
    policy = find_policy(policy, policy_field)
    check_platforms()
    mesh = mesh_from_config(experiment.mesh)
    location = options.workdir or f"runs/evaluate_{Path(options.config).stem}_{options.suite}"
    signals = StopSignals(experiment.checkpoint.grace_seconds)
    with (
        signals.handle(),
        local_workdir(location, signals) as workdir,
        compilation_cache(chosen_directory(options.compilation_cache)),
        needed_jax_settings(),
        use_mesh(mesh, experiment.mesh.split_rows),
        CompilationProgress(),
        explain_out_of_memory("evaluation", {"training.prompts_per_step": experiment.training.prompts_per_step}),
    ):
        context = RunContext(signals=signals)
        evaluate(options.suite, experiment, policy, policy_field, workdir, mesh, context, restart=options.restart)


def _read_results(options: argparse.Namespace, overrides: list[str]) -> None:
    """Run a suite that reads finished evaluations. Raises: UserError."""
    from rpt_jax.evaluation.suite import SUITES
    from rpt_jax.infra.remote_workdir import local_workdir
    from rpt_jax.infra.signals import StopSignals

    unused = [f"--{flag}" for flag in ("config", "policy", "restart", "compilation_cache") if getattr(options, flag)]
    unused += [override.partition("=")[0] for override in overrides]
    if unused:
        raise UserError(
            f"{unused[0]} has no effect with --suite={options.suite}, which reads finished evaluations.",
            field=unused[0],
        )
    locations = [part.strip() for part in options.results.split(",") if part.strip()]
    if len(locations) != 2:
        raise UserError(
            f"--results={options.results or '(none)'} must name the --workdir of two finished evaluations, separated by a comma.",
            field="--results",
        )
    directories = [fetch(location, "--results") for location in locations]
    with local_workdir(options.workdir or f"runs/evaluate_{options.suite}", StopSignals()) as workdir:
        SUITES[options.suite].function(*directories, workdir)


if __name__ == "__main__":
    run_command(main)
