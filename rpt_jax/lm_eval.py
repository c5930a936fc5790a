"""Run lm-evaluation-harness with the model "rpt_jax".

    python -m rpt_jax.lm_eval run --model rpt_jax --model_args policy=DIR --tasks arc_easy,hellaswag

This registers the model and runs the harness's own command, `lm_eval` (lm-eval 0.4.13, `pip install -e '.[lm-eval]'`), which
cannot load models from other packages by itself. Its arguments are the harness's; --model_args takes `policy` (a Hugging Face
directory, a policy that a run exported, or a GGUF file), `dtype`, `max_length`, `tokens_per_pass`, `logit_chunk_tokens` and
`seed`.
"""

from __future__ import annotations

import importlib.util
import sys

from rpt_jax.errors import UserError
from rpt_jax.infra.command_line import import_jax, run_command


def main(argv: list[str]) -> int:
    """Run the harness's command line with the model registered; return the exit code."""
    if {"-h", "--help"} & set(argv) and len(argv) == 2:
        print(__doc__)
        return 0
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                "this command needs lm-evaluation-harness, which is not installed: pip install -e '.[lm-eval]', in the clone.",
                field="lm_eval",
            )
        import_jax()
        import lm_eval.__main__  # pyright: ignore[reportMissingImports]

        import rpt_jax.evaluation.lm_eval_model  # noqa: F401 - registers the model.

        sys.argv = argv
        lm_eval.__main__.cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
