"""Free disk space and writable directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra.disk import check_free_space, check_writable


def test_a_directory_behind_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check_writable(tmp_path / "new" / "deep", "pretrain.export")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError) as raised:
            check_writable(path, "pretrain.export")
        assert raised.value.field == "pretrain.export"


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, free=5))
    check_free_space(tmp_path / "new", 5, "checkpoints", "keep fewer")
    with pytest.raises(UserError) as raised:
        check_free_space(tmp_path / "new", 6, "checkpoints", "keep fewer")
    assert raised.value.field == "--workdir"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    check_free_space(tmp_path, 6, "checkpoints", "keep fewer")
