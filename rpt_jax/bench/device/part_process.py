"""python -m rpt_jax.bench.device.part_process PART SIZES DESCRIPTOR: the process of one part, which reports to a descriptor."""

from __future__ import annotations

import os
import signal
import sys
import threading

from rpt_jax.bench.device.parts import PARTS
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.sizes import SIZES
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.compilation_cache import compilation_cache, default_directory
from rpt_jax.infra.jax_settings import needed_jax_settings


def main(argv: list[str]) -> None:
    """Measure one part."""
    name, sizes, descriptor = argv[1:]
    os.set_inheritable(int(descriptor), False)  # A process that this one starts must not keep it open.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Parts that run the same programs, and the next run of this command, need not compile them again.
    with compilation_cache(default_directory()), needed_jax_settings():
        report = Report(int(descriptor))
        try:
            PARTS[name].measure(report, SIZES[sizes])
        except UserError as error:
            report.note(str(error))
            sys.exit(ExitCode.USER_ERROR)


def _end_with_parent() -> None:
    """End this process and those that it has started when its parent ends, which closes its input."""
    os.read(sys.stdin.fileno(), 1)  # Nothing is ever written to it.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv)
