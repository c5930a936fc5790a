"""Reading `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": 1, "a": 1e999}'])
def test_json_that_the_parser_cannot_represent_is_refused(tmp_path: Path, text: str) -> None:
    """Too deep, too long an integer, and infinite."""
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(UserError) as raised:
        read_metrics(tmp_path / "metrics.jsonl")
    assert raised.value.field == str(tmp_path / "metrics.jsonl")
