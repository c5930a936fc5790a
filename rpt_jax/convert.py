"""Convert policies from and to Hugging Face format.

What is written to DIR depends on what SOURCE is:

    SOURCE                                  DIR
    a Hugging Face directory, or a .gguf    an rpt_jax policy, for policy.path
    an rpt_jax policy                       a Hugging Face directory
    the --workdir of a run                  a Hugging Face directory of its final policy,
                                            or of its latest checkpoint if there is none
    a checkpoint of a run,                  a Hugging Face directory
    WORKDIR/checkpoints/STEP

The adapters of a run with policy.lora are merged into its weights. With --adapters they
are written alone, in the format of Hugging Face's PEFT, from a checkpoint.

An rpt_jax policy is a Hugging Face directory whose weights were checked and whose
config.json records the fingerprint of its tokenizer; `transformers` loads it, too.
policy.path accepts the first two kinds of SOURCE also without conversion. Tensors keep
their dtype; those of GGUF files and checkpoints are written as float32.

Exit codes: 0 converted, 2 error (one line on stderr).
"""

from __future__ import annotations

import sys

from rpt_jax.config.user_paths import check_local_path, check_location, user_path
from rpt_jax.errors import UserError
from rpt_jax.infra.command_line import command_parser, import_jax, run_command
from rpt_jax.infra.storage import with_urls


def main(argv: list[str]) -> int:
    """Run the command line tool and return its exit code."""
    parser = command_parser("convert", __doc__ or "")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        required=True,
        help="a Hugging Face directory, a .gguf file, an rpt_jax policy, the --workdir of a run or one of its checkpoints",
    )
    parser.add_argument(
        "--to",
        dest="target",
        metavar="DIR",
        type=user_path,
        required=True,
        help="directory to create; it must not exist",
    )
    parser.add_argument(
        "--adapters", action="store_true", help="write the adapters of a run with policy.lora, for Hugging Face's PEFT"
    )
    options = parser.parse_args(argv[1:])
    try:
        check_location("--from", options.source)
        check_local_path("--to", options.target)
        import_jax()
        from rpt_jax.conversion import convert, fetch_source

        print(with_urls(convert(fetch_source(options.source), options.target, adapters=options.adapters)))
    except (UserError, OSError) as error:
        print(with_urls(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
