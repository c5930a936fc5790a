"""Corpus source "champ": competition problems with stepwise solutions (CHAMP, 2401.06961)."""

from __future__ import annotations

import collections
import importlib.util
import json
from pathlib import Path

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import Document
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES


def _champ_file() -> Path:
    spec = importlib.util.find_spec("champ_dataset")
    if spec is None:
        raise UserError("data.source='champ' needs the package champ-dataset: pip install champ-dataset==1.0.0")
    return Path(spec.origin).parent / "dataset_files" / "v0.json"


@CORPUS_SOURCES.register("champ", check=lambda config: _champ_file())
def champ(config: DataConfig, skipped: collections.Counter) -> list[Document]:
    del config, skipped
    documents = []
    for name, problem in json.loads(_champ_file().read_bytes())["problems"].items():
        lines = [problem["_text"], *(step["_text"] for step in problem["solution"]["steps"])]
        documents.append(Document("\n".join(lines), f"champ:{name}", key=problem["_text"]))
    return documents
