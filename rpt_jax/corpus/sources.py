"""Corpora: plain text documents, and which of them training never sees.

Three sources: problems with worked solutions that are generated here (`gsm_symbolic`), competition problems
with stepwise solutions (`champ`), and a user's own text (`path`, see readers.py). Every split is a function of `data.seed`
and of what a document says, so it does not move when files or lines change places.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.files import FileRange, find_units
from rpt_jax.corpus.readers import BY_HASH, Document, Rejected, read_unit
from rpt_jax.corpus.text_splitting import PIECE_CHARACTERS
from rpt_jax.errors import UserError

HELD_OUT_SHARE = 0.2
SPLITS = ("train", "held_out", "held_out_templates")
DUPLICATE = -2  # In place of the number of a side: a repetition.

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_FLOAT_NOISE = re.compile(r"\d\.\d{7}")  # 14.500000000000002: an artefact of the generator that nobody could predict.


class CorpusShard(NamedTuple):
    """One of `shards` parts of a corpus; `units` are those of the files that it has, None for all."""

    shard: int = 0
    shards: int = 1
    units: Sequence[FileRange] | None = None


WHOLE = CorpusShard()
_T = TypeVar("_T")


class RejectLog:
    """Counts what is no document by its reason, and lists it, one JSON object a line, in the file `listing`.

    The file is made with the first of them. Raises: UserError from `keep`, for the first, where `strict` says so.
    """

    def __init__(self, strict: bool, listing: Path | None = None):
        self.counts: collections.Counter = collections.Counter()
        self.first = ""
        self._strict, self._listing, self._files = strict, listing, contextlib.ExitStack()
        self._file: Any = None

    def keep(self, found: Iterable[_T | Rejected]) -> Iterator[_T]:
        """Yield what was found and is not rejected."""
        for item in found:
            if not isinstance(item, Rejected):
                yield item
            elif self._strict:
                raise UserError(f"{item.detail} (data.strict=True; without it this is counted and left out.)")
            else:
                self._add(item)

    def _add(self, item: Rejected) -> None:
        self.counts[item.reason] += 1
        self.first = self.first or item.detail
        if self._listing:
            if self._file is None:
                self._listing.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._files.enter_context(self._listing.open("w", encoding="utf-8"))
            self._file.write(json.dumps(dataclasses.asdict(item)) + "\n")

    def __enter__(self) -> Self:
        if self._listing:
            self._listing.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def report_rejects(counts: dict[str, int], where: str) -> None:
    """Print how much was left out of the corpus and why, where anything was."""
    if counts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda c: -c[1]))
        print(f"Left out of the corpus: {reasons}.{f' Listed in {where}.' if where else ''}")


def training_texts(config: DataConfig, most_bytes: int, advance: Callable[[], None]) -> Iterator[str]:
    """Yield the texts of the training documents, in order; of a corpus with more than `most_bytes`, some of them.

    Which ones depends on `data.seed` and on what they say. The corpus is read twice, and what stays in memory are 32 bytes for
    every document.

    Args:
      advance: see `read_corpus`; twice as often.

    Raises: UserError, as `read_corpus` and `split` do, and with `data.strict` for what is no document.
    """
    rejects, rows = RejectLog(config.strict), array.array("Q")
    for document in rejects.keep(read_corpus(config, collections.Counter(), advance=advance)):
        rows.extend((*fingerprints(document, config.seed), len(document.text.encode()), document.side - BY_HASH))
    keys_D, texts_D, sizes_D, sides_D = np.frombuffer(rows, np.uint64).reshape(-1, 4).T
    sides_D = split(keys_D, texts_D, sides_D.astype(np.int8) + np.int8(BY_HASH), config, rejects.first)
    train_M = np.flatnonzero(sides_D == SPLITS.index("train"))
    by_key_M = train_M[np.argsort(keys_D[train_M], kind="stable")]
    chosen_D = np.zeros(len(keys_D), bool)
    chosen_D[by_key_M[: max(1, np.searchsorted(np.cumsum(sizes_D[by_key_M]), most_bytes, side="right"))]] = True
    again = RejectLog(False).keep(read_corpus(config, collections.Counter(), advance=advance))
    yield from (document.text for document, chosen in zip(again, chosen_D, strict=True) if chosen)


def read_corpus(
    config: DataConfig,
    skipped: collections.Counter,
    part: CorpusShard = WHOLE,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Document | Rejected]:
    """Yield the documents of a part of the corpus, in order; what a generator skips is counted in `skipped`.

    Args:
      advance: called after each unit of the part; where there are none, after all of it.
    """
    if config.source == "path":
        for unit in find_units(config)[part.shard :: part.shards] if part.units is None else part.units:
            yield from read_unit(unit, config)
            advance()
    else:
        generate = {"gsm_symbolic": _gsm_symbolic, "champ": _champ}[config.source]
        yield from generate(config, skipped)[part.shard :: part.shards]
        advance()


def fingerprints(document: Document, seed: int) -> tuple[int, int]:
    """64 bits that its side depends on, and 64 bits of its text."""
    return _hash(seed, document.key or document.text), _hash(0, document.text)


def split(
    keys_D: np.ndarray, texts_D: np.ndarray, sides_D: np.ndarray, config: DataConfig, example: str = ""
) -> np.ndarray:
    """Say of every document which of `SPLITS` it is on, or `DUPLICATE` for a text that was there before; int8 [D].

    Where a document has no side yet (BY_HASH), the lowest keys are held out: a fifth, at most `data.held_out_documents`.
    Ranks, unlike a threshold, leave no document unused and no side empty, and neither the order of documents nor how they
    are spread over files and shards changes a side.

    Args:
      keys_D, texts_D: see `fingerprints`.
      example: what was wrong with the first thing that is no document, for the error.

    Raises: UserError, where there are too few documents.
    """
    first_U = np.unique(texts_D, return_index=True)[1]
    result_D = np.full(len(texts_D), DUPLICATE, np.int8)
    result_D[first_U] = sides_D[first_U]
    open_U = np.sort(first_U[sides_D[first_U] == BY_HASH])
    if len(open_U) < 2 and len(open_U) == len(first_U):
        raise UserError(
            f"{source_name(config)} is too short: it gives {len(open_U)} distinct document(s), and at least 2 are needed, one "
            f"to train on and one to hold out. {example or 'Add text'}: a .txt is cut into documents of about "
            f"{PIECE_CHARACTERS} characters, a .jsonl has one document per line."
        )
    count = min(config.held_out_documents, max(1, int(len(open_U) * HELD_OUT_SHARE)))
    result_D[open_U] = SPLITS.index("train")
    result_D[open_U[np.argsort(keys_D[open_U], kind="stable")[:count]]] = SPLITS.index("held_out")
    return result_D


def source_name(config: DataConfig) -> str:
    """What to call the corpus in a message."""
    return f"data.path='{config.path}'" if config.source == "path" else f"data.source='{config.source}'"


def check_source(config: DataConfig) -> None:
    """Raises: UserError, where the source is not here at all; what it says is not read."""
    checks = {"gsm_symbolic": _gsm_generators, "champ": _champ_file, "path": lambda: find_units(config)}
    checks[config.source]()


def _hash(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:8], "big")


# --- gsm_symbolic ---------------------------------------------------------------------------------


def _gsm_symbolic(config: DataConfig, skipped: collections.Counter) -> list[Document]:
    """Generate problems with worked solutions, holding out combinations of numbers and whole templates.

    The sorted numbers of a problem decide by hash whether it may be trained on, whatever its template: no
    combination of numbers in `held_out` ever occurs in `train`. There are a third as many documents of unseen
    templates as of unseen numbers.
    """
    generators = _gsm_generators()
    templates = Random(f"{config.seed}:templates").sample(sorted(generators), len(generators))
    if config.held_out_templates >= len(templates):
        raise UserError(
            f"data.held_out_templates={config.held_out_templates} leaves none to train on: gsm_symbolic has "
            f"{len(templates)} templates. Choose at most {len(templates) - 1}."
        )
    unseen, seen = templates[: config.held_out_templates], templates[config.held_out_templates :]
    quotas = {"train": config.documents, "held_out": config.held_out_documents}

    def side(problem: str) -> str:
        numbers = sorted(number.replace(",", "") for number in _NUMBER.findall(problem))
        return "held_out" if _hash(config.seed, " ".join(numbers)) < HELD_OUT_SHARE * 2**64 else "train"

    drawn = _draw({t: generators[t] for t in seen}, config.seed, quotas, side, skipped)
    unseen_quota = {"held_out_templates": config.held_out_documents // 3 if unseen else 0}
    drawn |= _draw(
        {t: generators[t] for t in unseen}, config.seed, unseen_quota, lambda problem: "held_out_templates", skipped
    )
    return [
        dataclasses.replace(document, side=SPLITS.index(name))
        for name, documents in drawn.items()
        for document in documents
    ]


def _gsm_generators() -> dict[int, Callable[[Random, float], dict[str, Any]]]:
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError as error:
        raise UserError(
            "data.source='gsm_symbolic' needs the package reasoning-gym: pip install reasoning-gym==0.1.25"
        ) from error
    dataset = gsm_symbolic.GSMSymbolicDataset(gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1))
    # The package lists by number the templates that it has checked. Going to their generators instead of through the
    # dataset tells the template of an item, and leaves out the boilerplate that the dataset appends to every question.
    return {number: dataset.generators[number] for number in gsm_symbolic.tasks_ok}


def _draw(
    generators: dict[int, Callable[[Random, float], dict[str, Any]]],
    seed: int,
    quotas: dict[str, int],
    side: Callable[[str], str],
    skipped: collections.Counter,
) -> dict[str, list[Document]]:
    """Draw from the templates in turn until every side has its quota; what a full side is offered is dropped."""
    drawn: dict[str, list[Document]] = {name: [] for name in quotas}
    texts: set[str] = set()
    templates = list(generators)
    # Some templates have few different items. Without a limit a quota beyond them would never be reached.
    limit = 1000 + 20 * sum(quotas.values())
    for attempt in itertools.count():
        if all(len(drawn[name]) >= quota for name, quota in quotas.items()):
            return drawn
        if attempt == limit:
            break
        draw, index = divmod(attempt, len(templates))
        template = templates[index]
        try:
            item = generators[template](Random(f"{seed}:{template}:{draw}"), 1.0)
        except (ValueError, ArithmeticError, LookupError) as error:  # The template has no valid numbers here.
            skipped[f"generator raised {type(error).__name__}"] += 1
            continue
        problem = item["question"]
        text = f"{problem}\n{item['metadata']['answer_cot']}"
        if _FLOAT_NOISE.search(text):
            skipped["floating-point noise"] += 1
        elif text in texts:
            skipped["duplicate"] += 1
        elif len(drawn[name := side(problem)]) < quotas[name]:
            texts.add(text)
            drawn[name].append(Document(text, f"gsm_symbolic:{template}:{draw}", str(template)))
    found = ", ".join(f"{len(drawn[name])} of {quota} for {name}" for name, quota in quotas.items())
    raise UserError(
        f"gsm_symbolic gave too few different documents in {limit} draws: {found}. "
        "Lower data.documents or data.held_out_documents."
    )


# --- champ ----------------------------------------------------------------------------------------


def _champ_file() -> Path:
    spec = importlib.util.find_spec("champ_dataset")
    if spec is None:
        raise UserError("data.source='champ' needs the package champ-dataset: pip install champ-dataset==1.0.0")
    return Path(spec.origin).parent / "dataset_files" / "v0.json"


def _champ(config: DataConfig, skipped: collections.Counter) -> list[Document]:
    del config, skipped
    documents = []
    for name, problem in json.loads(_champ_file().read_bytes())["problems"].items():
        lines = [problem["_text"], *(step["_text"] for step in problem["solution"]["steps"])]
        documents.append(Document("\n".join(lines), f"champ:{name}", key=problem["_text"]))
    return documents
