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
from rpt_jax.corpus.documents import HELD_OUT_FRACTION, SPLITS, Document, hash64
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES

# Draws a problem with the given random generator and difficulty.
Template = Callable[[Random, float], dict[str, Any]]

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# 14.500000000000002: a rounding artifact of the generator, which cannot be predicted.
_FLOAT_NOISE = re.compile(r"\d\.\d{7}")


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


@CORPUS_SOURCES.register("gsm_symbolic", options=GsmSymbolicOptions, check=lambda config: load_templates())
def generate_gsm_symbolic(config: DataConfig, skipped: collections.Counter, section: str = "data") -> list[Document]:
    """Generate problems with worked solutions, holding out combinations of numbers and whole templates.

    A hash of the sorted numbers of a problem decides whether it may be trained on, regardless of its template: no combination
    of numbers in "held_out" occurs in "train". The split "unseen" has a third as many documents as "held_out".

    Args:
      config: `seed`, `held_out_documents` and `source_options` are read.
      skipped: counts the discarded draws by reason.
      section: that has the options, for messages.

    Raises: UserError, if a package is missing or the templates cannot generate enough different documents.
    """
    options = config.source_options or GsmSymbolicOptions()

    # Hold out whole templates.
    templates = load_templates()
    numbers = Random(f"{config.seed}:templates").sample(sorted(templates), len(templates))
    if options.held_out_templates >= len(numbers):
        field = f"{section}.source_options.held_out_templates"
        raise UserError(
            f"{field}={options.held_out_templates} leaves no template to train on: gsm_symbolic has {len(numbers)} templates. "
            f"Choose at most {len(numbers) - 1}.",
            field=field,
        )
    unseen = {number: templates[number] for number in numbers[: options.held_out_templates]}
    seen = {number: templates[number] for number in numbers[options.held_out_templates :]}

    def split_by_numbers(problem: str) -> str:
        key = " ".join(sorted(number.replace(",", "") for number in _NUMBER.findall(problem)))
        return "held_out" if hash64(config.seed, key) < HELD_OUT_FRACTION * 2**64 else "train"

    # Generate the documents of the other templates, and then those of the held-out ones.
    quotas = {"train": options.documents, "held_out": config.held_out_documents}
    unseen_quotas = {"unseen": config.held_out_documents // 3 if unseen else 0}
    drawn = _draw(seen, config.seed, quotas, split_by_numbers, skipped, section)
    drawn |= _draw(unseen, config.seed, unseen_quotas, lambda problem: "unseen", skipped, section)
    return [
        dataclasses.replace(document, split=SPLITS.index(split), key=document.group if split == "unseen" else "")
        for split, documents in drawn.items()
        for document in documents
    ]


def load_templates(field: str = "data.source") -> dict[int, Template]:
    """Return the templates of GSM-Symbolic by number. Raises: UserError, about the config field, if the package is missing."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError as error:
        raise UserError(
            f"{field}: the problems need the package reasoning-gym: pip install reasoning-gym==0.1.25",
            field=field,
        ) from error
    dataset = gsm_symbolic.GSMSymbolicDataset(gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1))
    # The package lists the numbers of the templates that it has checked. Calling the generators directly, instead of the
    # dataset, gives the template of each item and omits the instructions that the dataset appends to every question.
    return {number: dataset.generators[number] for number in gsm_symbolic.tasks_ok}


def _draw(
    templates: dict[int, Template],
    seed: int,
    quotas: dict[str, int],
    split_of: Callable[[str], str],
    skipped: collections.Counter,
    section: str,
) -> dict[str, list[Document]]:
    """Draw from the templates in turn until every split has its quota.

    A document whose split is already full is discarded.

    Args:
      templates: by number.
      seed: of the draws.
      quotas: number of documents for each split.
      split_of: the split that a problem belongs to.
      skipped: counts the discarded draws by reason.
      section: that has the options, for messages.

    Returns: the documents of each split. Raises: UserError, if a quota is not reached.
    """
    drawn: dict[str, list[Document]] = {split: [] for split in quotas}
    texts: set[str] = set()
    numbers = list(templates)
    # Some templates have few different items. Without a limit, a quota beyond them would never be reached.
    limit = 1000 + 20 * sum(quotas.values())
    for attempt in itertools.count():
        if all(len(drawn[split]) >= quota for split, quota in quotas.items()):
            return drawn
        if attempt == limit:
            break

        # Draw an item; the random generator depends only on the template and the number of its draws so far.
        draw, index = divmod(attempt, len(numbers))
        template = numbers[index]
        try:
            item = templates[template](Random(f"{seed}:{template}:{draw}"), 1.0)
        except (ValueError, ArithmeticError, LookupError) as error:  # The template has no valid numbers for this draw.
            skipped[f"generator raised {type(error).__name__}"] += 1
            continue

        # Keep it, unless it is noise, a repetition, or its split is full.
        problem = item["question"]
        text = f"{problem}\n{item['metadata']['answer_cot']}"
        if _FLOAT_NOISE.search(text):
            skipped["floating-point noise"] += 1
        elif text in texts:
            skipped["duplicate"] += 1
        elif len(drawn[split := split_of(problem)]) < quotas[split]:
            texts.add(text)
            drawn[split].append(Document(text=text, name=f"gsm_symbolic:{template}:{draw}", group=str(template)))

    found = ", ".join(f"{len(drawn[split])} of {quota} for {split}" for split, quota in quotas.items())
    raise UserError(
        f"gsm_symbolic generated too few different documents in {limit} draws: {found}. "
        f"Lower {section}.source_options.documents, or the number of held-out documents.",
        field=f"{section}.source_options.documents",
    )
