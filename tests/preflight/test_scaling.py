"""Comparing the records of several numbers of chips."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rpt_jax.errors import UserError
from rpt_jax.preflight import scaling


def write_record(directory: Path, chips: int, prompts: int) -> Path:
    collective = {"kind": "all-gather", "size": 4, "in_host": True, "sent_bytes": 3e12, "runs": 1}
    program = {"flops": 2e12 * prompts / chips, "memory_traffic_bytes": 5e12, "collectives": [collective]}
    programs = [program | {"program": name} for name in ("score", "sample", "update")]
    record = {"topology": f"v6e:{chips}", "chips": chips, "prompts_per_step": prompts, "programs": programs}
    path = directory / f"{chips}-{prompts}.json"
    path.write_text(json.dumps(record | {"estimated_step_seconds": 7.0}))
    return path


def test_records_are_compared_in_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [write_record(tmp_path, *sizes) for sizes in ((16, 256), (64, 256), (64, 1024), (256, 4096))]
    assert scaling.main(["scaling", *map(str, paths), f"--plot={tmp_path / 'plot.png'}"]) == 0
    out = capsys.readouterr().out
    # Two of the programs belong to a step. With 256 prompts, a chip of 64 has a quarter of the FLOPs of a chip of 16.
    for row in ("v6e:16 | 16 | 256 | 64 | 10 | 6 | 7", "v6e:64 | 64 | 256 | 16 | 10 | 6 | 7"):
        assert row in re.sub(r" +", " ", out)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    runs = [scaling.read_run(path) for path in paths]
    assert [len(scaling.largest_group(runs, key)) for key in scaling.SCALINGS.values()] == [2, 3]


@pytest.mark.parametrize(("name", "words"), [("no/plot.png", "does not exist"), ("plot.foo", "must end in .png")])
def test_a_plot_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
):
    assert scaling.main(["scaling", "missing.json", f"--plot={tmp_path / name}"]) == 2
    assert words in capsys.readouterr().err


def test_files_that_preflight_did_not_write_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert scaling.main(["scaling", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    with pytest.raises(UserError, match="missing.json cannot be read: No such file"):
        scaling.read_run(tmp_path / "missing.json")
