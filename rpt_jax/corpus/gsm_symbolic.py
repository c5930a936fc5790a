"""Corpus source "gsm_symbolic": grade-school problems with worked solutions, generated from templates."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable
from random import Random
from typing import Any

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import HELD_OUT_SHARE, SPLITS, Document, hash64
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_FLOAT_NOISE = re.compile(
    r"\d\.\d{7}"
)  # 14.500000000000002: a rounding artifact of the generator, which cannot be predicted.


@dataclasses.dataclass(frozen=True)
class GsmSymbolicOptions:
    """Settings of the generator."""

    # Number of training documents to generate.
    documents: int = 2000
    # Number of templates whose documents are never trained on; they make up the split "unseen".
    held_out_templates: int = 10

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("held_out_templates", 0)):
            value = getattr(self, name)
            if value < least:
                field = f"data.source_options.{name}"
                raise UserError(f"{field}={value} must be at least {least}.", field=field)


@CORPUS_SOURCES.register("gsm_symbolic", options=GsmSymbolicOptions, check=lambda config: _gsm_generators())
def gsm_symbolic(config: DataConfig, skipped: collections.Counter) -> list[Document]:
    """Generate problems with worked solutions, holding out combinations of numbers and whole templates.

    The sorted numbers of a problem decide by hash whether it may be trained on, whatever its template: no
    combination of numbers in `held_out` ever occurs in `train`. There are a third as many documents of unseen
    templates as of unseen numbers.
    """
    options = config.source_options or GsmSymbolicOptions()
    generators = _gsm_generators()
    templates = Random(f"{config.seed}:templates").sample(sorted(generators), len(generators))
    if options.held_out_templates >= len(templates):
        raise UserError(
            f"data.source_options.held_out_templates={options.held_out_templates} leaves none to train on: gsm_symbolic has "
            f"{len(templates)} templates. Choose at most {len(templates) - 1}."
        )
    unseen, seen = templates[: options.held_out_templates], templates[options.held_out_templates :]
    quotas = {"train": options.documents, "held_out": config.held_out_documents}

    def side(problem: str) -> str:
        numbers = sorted(number.replace(",", "") for number in _NUMBER.findall(problem))
        return "held_out" if hash64(config.seed, " ".join(numbers)) < HELD_OUT_SHARE * 2**64 else "train"

    drawn = _draw({t: generators[t] for t in seen}, config.seed, quotas, side, skipped)
    unseen_quota = {"unseen": config.held_out_documents // 3 if unseen else 0}
    drawn |= _draw({t: generators[t] for t in unseen}, config.seed, unseen_quota, lambda problem: "unseen", skipped)
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
        "Lower data.source_options.documents or data.held_out_documents."
    )
