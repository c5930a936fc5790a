"""python -m rpt_jax.doctor --workdir=WORKDIR

Says what is wrong with a run, in sentences with their evidence, and which config fields to change. The run may still be running.
Rules that cannot be checked, because the run has no such metric or too few steps, are listed with the reason. Exit codes: 0 if
every run could be examined, whatever was found, or 2 if a directory is not that of a training run of this format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from rpt_jax.config.user_paths import check_location
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.command_line import import_jax, run_command
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.storage import LARGE_FOLDERS, fetch, with_urls

if TYPE_CHECKING:
    from rpt_jax.diagnosis.examination import Diagnosis


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="python -m rpt_jax.doctor", description=description)
    parser.add_argument(
        "--workdir", required=True, action="append", help="directory of a run, or its URL; may be repeated"
    )
    parser.add_argument("--rule", action="append", help="check only this rule; may be repeated")
    parser.add_argument("--json", action="store_true", help="print a JSON list with an object for each run")
    options = parser.parse_args(argv[1:])
    diagnoses = []
    failed = False
    for workdir in options.workdir:
        try:
            import_jax()
            from rpt_jax.diagnosis.examination import describe, examine

            check_location("--workdir", workdir)
            diagnosis = examine(fetch(workdir, "--workdir", skip={*LARGE_FOLDERS, POLICY}), options.rule)
        except UserError as error:
            print(with_urls(f"error: {error}"), file=sys.stderr)
            failed = True
            continue
        diagnoses.append(diagnosis)
        if not options.json:
            print(with_urls(describe(diagnosis)))
    if options.json:
        print(with_urls(json.dumps([_json_values(diagnosis) for diagnosis in diagnoses], indent=1)))
    return ExitCode.USER_ERROR if failed else ExitCode.COMPLETE


def _json_values(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as JSON values."""
    findings = [
        {
            "rule": finding.rule,
            "severity": finding.severity.name.lower(),
            "sentence": finding.sentence,
            "evidence": [evidence._asdict() for evidence in finding.evidence],
            "changes": [change._asdict() for change in finding.changes],
        }
        for finding in diagnosis.findings
    ]
    not_checked = {skipped.rule: skipped.reason for skipped in diagnosis.not_checked}
    return dataclasses.asdict(diagnosis) | {"findings": findings, "not_checked": not_checked}


if __name__ == "__main__":
    run_command(main)
