"""Show what a policy makes of a text of yours: one HTML page, without training.

    python -m rpt_jax.explain [--policy=POLICY] [--text=FILE] [--positions=12 | --at=TOKEN,TOKEN] [--out=explain.html]

The page has the entropy and the direct prediction at each token and, at some positions, sampled reasoning with its prediction and
its reward. Without arguments it shows an example text and the small policy that comes with rpt_jax. Exit codes: 0, or 2 for
something to fix.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rpt_jax.config.user_paths import check_local_path, check_location, user_path
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.command_line import command_parser, import_jax, run_command
from rpt_jax.infra.storage import LARGE_FOLDERS, fetch, with_urls

# The config fields that have an effect on the page. Those that a flag sets are not among them.
_READ = (
    "prompt.",
    "policy.dtype",
    "policy.precision",
    "policy.head_precision",
    "policy.attention",
    "rollout.top_k",
    "rollout.top_p",
    "rollout.stop_at_box",
    "rollout.decode_slots",
    "rollout.prefill_tokens",
    "data.max_document_tokens",
    "data.min_context",
    "data.entropy_top_k",
    "data.score_batch_windows",
    "training.logit_chunk_tokens",
    "mesh.",
)


def _count(text: str) -> int:
    """Return a number of at least 1. Raises: ValueError."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _seed(text: str) -> int:
    """Return a number that a seed can be. Raises: ValueError."""
    if not 0 <= (number := int(text)) < 2**32:
        raise ValueError(text)
    return number


def _temperature(text: str) -> float:
    """Return a number above 0. Raises: ValueError."""
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError(text)
    return number


def _token_numbers(text: str) -> list[int]:
    """Return the numbers of a comma-separated list, at least one. Raises: ValueError."""
    return [int(part) for part in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags; overrides of config fields are no flags."""
    parser = command_parser("explain", __doc__ or "")
    parser.add_argument(
        "--policy",
        default="",
        help="a Hugging Face directory, a .gguf file, or a run; default: the small policy that comes with rpt_jax",
    )
    parser.add_argument("--text", type=user_path, help="UTF-8 file with the text; default: an example")
    parser.add_argument(
        "--config",
        help="config file that says how prompts are made; default: that of the run or, without --policy, configs/rpt_tiny.py",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--positions", type=_count, default=12, help="positions with the highest entropy (default: %(default)s)"
    )
    chosen.add_argument("--at", type=_token_numbers, help="numbers of tokens instead, separated by commas, from 0")
    parser.add_argument("--samples", type=_count, default=8, help="responses at a position (default: %(default)s)")
    parser.add_argument("--temperature", type=_temperature, help="of sampling; default: that of the config")
    parser.add_argument("--length", type=_count, help="tokens of a response, at most; default: those of the config")
    parser.add_argument("--seed", type=_seed, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--out", type=user_path, default=Path("explain.html"), help="the page (default: %(default)s)")
    parser.add_argument(
        "--compilation_cache",
        help="directory for compiled programs, which later runs load; 'off' for none; default: rpt_jax in your cache directory",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    from rpt_jax.config.loading import split_overrides

    overrides, others = split_overrides(argv)
    options = make_parser().parse_args(others[1:])
    try:
        check_location("--policy", options.policy)
        for flag in ("text", "out", "compilation_cache"):
            check_local_path(f"--{flag}", getattr(options, flag))
        import_jax()
        from rpt_jax.infra.console import console_logging

        with console_logging():
            _explain(options, overrides)
    except (UserError, OSError) as error:
        print(with_urls(f"error: {error}"), file=sys.stderr)
        return ExitCode.USER_ERROR
    return ExitCode.COMPLETE


def _explain(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write the page. Raises: UserError, OSError."""
    import dataclasses

    from rpt_jax.config import from_config_dict
    from rpt_jax.config.loading import packaged_configs
    from rpt_jax.distributed.mesh import use_mesh
    from rpt_jax.explanation import (
        Explainer,
        hardest_positions,
        positions_at,
        read_text,
        render_explanation,
        sampling_experiment,
        tokenize_text,
        window_tokens,
    )
    from rpt_jax.infra.atomic_write import atomic_write
    from rpt_jax.infra.compilation_cache import chosen_directory, compilation_cache
    from rpt_jax.infra.compilation_progress import CompilationProgress
    from rpt_jax.infra.disk import check_writable
    from rpt_jax.infra.jax_settings import check_platforms, needed_jax_settings
    from rpt_jax.infra.out_of_memory import explain_out_of_memory
    from rpt_jax.setup import find_policy, load_starting_policy, mesh_from_config
    from rpt_jax.sizes.plan import plan_run

    # --- Read what was asked for -------------------------------------------------------------------
    text_path = options.text or packaged_configs() / "tiny" / "example.txt"
    content = read_text(text_path)
    check_writable(options.out.parent, "--out")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    given = str(
        fetch(options.policy, "--policy", skip=LARGE_FOLDERS) if options.policy else packaged_configs() / "tiny"
    )
    policy_path = find_policy(given, "--policy")
    for assignment in overrides:
        if not assignment.startswith(_READ):
            field = assignment.partition("=")[0]
            raise UserError(f"--config.{field} has no effect on the page; these have: {', '.join(_READ)}.", field=field)
    experiment = from_config_dict(_config(options, Path(given)), overrides, "next_token")
    check_platforms()
    mesh = mesh_from_config(experiment.mesh)
    subject = dataclasses.replace(experiment.policy, path=policy_path, preset="")
    sampled = sampling_experiment(
        experiment,
        samples=options.samples,
        temperature=options.temperature or 0.0,
        length=options.length or 0,
        seed=options.seed,
        positions=len(set(options.at)) if options.at else options.positions,
    )

    # --- Load the policy, score the text and sample ------------------------------------------------
    with (
        compilation_cache(chosen_directory(options.compilation_cache)),
        needed_jax_settings(),
        use_mesh(mesh, experiment.mesh.split_rows),
        CompilationProgress(),
        explain_out_of_memory("explain", {"--positions": options.positions, "--samples": options.samples}),
    ):
        # The task is one that only samples.
        planned = plan_run(dataclasses.replace(sampled, task="difficulty", policy=subject), mesh)
        policy, params, tokenizer = load_starting_policy(subject, mesh, "--policy")
        text = tokenize_text(text_path, content, tokenizer, window_tokens(planned, policy))
        explainer = Explainer(planned, policy, params, tokenizer, mesh)
        scores = explainer.score(text)
        boxable_V = explainer.boxable_V
        if options.at:
            positions = positions_at(text, scores, boxable_V, options.at)
        else:
            positions = hardest_positions(text, scores, boxable_V, options.positions, planned.data.min_context)
        groups = explainer.reason(text, positions)
    page = render_explanation(text, scores, groups, tokenizer, planned, options.policy or "configs/tiny")
    atomic_write(options.out, page)
    print(options.out)


def _config(options: argparse.Namespace, policy: Path) -> Any:
    """Return the values of the config that says how prompts are made. Raises: UserError."""
    from rpt_jax.config import default_config, load_config_file
    from rpt_jax.infra.workdir import is_run_directory, read_run_config

    if options.config:
        return load_config_file(options.config)
    if not options.policy:
        return load_config_file("configs/rpt_tiny.py")
    if not is_run_directory(policy):
        return default_config()
    values: dict[str, Any] = {}
    for name, value in read_run_config(policy).items():
        *sections, field = name.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[field] = value
    return values


if __name__ == "__main__":
    run_command(main)
