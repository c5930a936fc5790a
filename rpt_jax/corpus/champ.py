"""Corpus source "champ": competition problems with stepwise solutions (CHAMP, arXiv:2401.06961)."""

from __future__ import annotations

import collections
import importlib.util
import json
from pathlib import Path

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import Document
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES


def _find_dataset_file() -> Path:
    spec = importlib.util.find_spec("champ_dataset")
    if spec is None or spec.origin is None:
        raise UserError(
            "data.source='champ' needs the package champ-dataset: pip install champ-dataset==1.0.0",
            field="data.source",
        )
    return Path(spec.origin).parent / "dataset_files" / "v0.json"


@CORPUS_SOURCES.register("champ", check=lambda config: _find_dataset_file())
def read_champ(config: DataConfig, skipped: collections.Counter) -> list[Document]:
    """Read the problems of the installed package `champ-dataset`, each followed by the steps of its solution."""
    del config, skipped
    documents = []
    for name, problem in json.loads(_find_dataset_file().read_bytes())["problems"].items():
        lines = [problem["_text"], *(step["_text"] for step in problem["solution"]["steps"])]
        documents.append(Document(text="\n".join(lines), name=f"champ:{name}", key=problem["_text"]))
    return documents
