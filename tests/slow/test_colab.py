"""The Colab notebook, run from top to bottom on the CPU with small sizes."""

from __future__ import annotations

import os
import sys
import types
import zipfile
from pathlib import Path

import pytest

from rpt_jax.weights.hf import load_model_config
from tests.helpers.notebook import cells
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL

SMOLLM2 = {
    "policy.dtype": "float32",  # Faster than bfloat16 on a CPU.
    "data.source_options.documents": 12,
    "data.held_out_documents": 8,
    "data.source_options.held_out_templates": 1,
    "data.max_document_tokens": 64,
    "prompt.template": "plain",
    "prompt.max_tokens": 64,
    "cold_start.total_steps": 1,
    "pretrain.windows_per_step": 2,
    "pretrain.traces_per_window": 4,
    "pretrain.rows_per_window": 1,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 8,
    "training.prompts_per_step": 2,
    "training.total_steps": 1,
    "training.dynamic_sampling_rounds": 1,
    "training.microbatch_tokens": 128,
    "evaluation.positions": 2,
    "evaluation.unseen_positions": 2,
}


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rpt_jax", "configs", "requirements.txt", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    shown: list[str] = []
    display = types.ModuleType("IPython.display")
    display.__dict__.update(Image=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)

    # The settings cell, then the additional flags that it offers, then the other cells.
    namespace: dict[str, object] = {}
    settings, *rest = cells("code")
    exec(compile(settings, "settings", "exec"), namespace)
    for name, fields in (("TINY", SMALL), ("SMOLLM2", SMOLLM2)):
        assert namespace[name] == []
        namespace[name] = [f"--config.{field}={value}" for field, value in fields.items()]
    for number, source in enumerate(rest, start=1):
        exec(compile(source, f"cell {number}", "exec"), namespace)

    drawn = [sorted(Path("runs", run, "plots").glob("*.png")) for run in ("tiny", "smollm2")]
    assert all(drawn) and list(map(Path, shown)) == [*drawn[0], *drawn[1]]
    assert all(os.path.getsize(plot) for plot in shown)
    assert load_model_config(tmp_path / "exported" / "smollm2")[0].layers == 30
    assert "config.json" in zipfile.ZipFile(tmp_path / "smollm2.zip").namelist()
