"""What every command-line tool does around its own work. Importing this module does not import JAX."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.gpu_settings import has_gpu, set_gpu_defaults


class _Pipe(io.FileIO):
    """A file descriptor to which writing goes on, to nowhere, once it fails: a full disk behind a log must not end a run.

    That a reader has left, as in `rpt --help | head -1`, is not worth a warning.
    """

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            _discard_output(self.fileno())
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                with contextlib.suppress(OSError):
                    os.write(2, f"warning: the standard output cannot be written ({error.strerror})\n".encode())
            return super().write(data)  # pyright: ignore[reportArgumentType]


def _discard_output(descriptor: int) -> None:
    """Let `descriptor` write to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _robust_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a text stream to `descriptor` that neither a closed descriptor nor a character that it cannot encode makes fail.

    Args:
      stream: Python's own stream to `descriptor`; None if the descriptor was closed when Python started.
      descriptor: 1 or 2.
    """
    if stream is None:
        # Otherwise the next file that is opened would get this number, and what C libraries print would land in it.
        _discard_output(descriptor)
    encoding = stream.encoding if stream else "utf-8"
    file = _Pipe(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or file.isatty(),
    )


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run the command-line tool `main` with the arguments of this process, and exit with the code that it returns."""
    sys.stdout = _robust_stream(sys.stdout, 1)
    sys.stderr = _robust_stream(sys.stderr, 2)
    # Hide the log of XLA, which calls a slow compilation an error: a failure also raises an exception, whose message is printed.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # A notebook's own backend, which its child processes inherit, need not exist here; a tool shows no figure, but writes files.
    os.environ["MPLBACKEND"] = "agg"
    if has_gpu():
        set_gpu_defaults(os.environ)
    code = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == ExitCode.USER_ERROR:
        os._exit(code)  # At a normal exit, libraries would try again to write what could not be written.
    sys.exit(code)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser without flags.

    Args:
      name: of the command, as in `python -m rpt_jax.NAME`.
      description: docstring of its module; the first paragraph comes before the flags in the help, the rest after them.
    """
    summary, _, details = description.partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m rpt_jax.{name}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def import_jax() -> None:
    """Import JAX. Raises: UserError, if JAX refuses a variable of the environment, such as JAX_ENABLE_X64=maybe."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(f"JAX refuses the environment: {error}. Correct or unset the variable.", field="JAX") from None
