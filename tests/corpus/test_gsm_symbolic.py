"""The generated corpus: what it contains, what it holds out, and when it gives up."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from rpt_jax.config import DataConfig
from rpt_jax.corpus import gsm_symbolic
from rpt_jax.corpus.documents import Document
from rpt_jax.corpus.gsm_symbolic import GsmSymbolicOptions
from rpt_jax.errors import UserError
from tests.helpers.whole_corpus import Corpus, load_corpus

CONFIG = DataConfig(source_options=GsmSymbolicOptions(documents=200, held_out_templates=7), held_out_documents=60)


def with_options(config: DataConfig = CONFIG, **options: int) -> DataConfig:
    assert isinstance(config.source_options, GsmSymbolicOptions)
    return dataclasses.replace(config, source_options=dataclasses.replace(config.source_options, **options))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(CONFIG)


def test_it_generates_as_many_documents_as_requested(corpus: Corpus) -> None:
    assert (len(corpus.train), len(corpus.held_out), len(corpus.unseen)) == (200, 60, 20)
    documents = corpus.train + corpus.held_out + corpus.unseen
    names = {document.name for document in documents}
    assert len(names) == len({document.text for document in documents}) == len(documents)
    for document in documents:
        assert re.search(r"\n#### -?\d+(\.\d+)?$", document.text), "the worked solution ends every document"
        assert "Do not include units" not in document.text
        assert not re.search(r"\d\.\d{7}", document.text)


def test_it_holds_out_combinations_of_numbers_and_templates(corpus: Corpus) -> None:
    def numbers(document: Document) -> tuple[float, ...]:
        problem = document.text.split("\n")[0]
        return tuple(sorted(float(number.replace(",", "")) for number in re.findall(r"\d[\d,.]*\b", problem)))

    assert not {numbers(d) for d in corpus.train} & {numbers(d) for d in corpus.held_out}
    seen = {document.group for document in corpus.train + corpus.held_out}
    unseen = {document.group for document in corpus.unseen}
    assert len(unseen) == 7 and not seen & unseen


def test_it_is_a_function_of_its_config(corpus: Corpus) -> None:
    assert load_corpus(CONFIG) == corpus
    more = load_corpus(with_options(documents=300))
    assert more.train[:200] == corpus.train and more.held_out == corpus.held_out
    other = load_corpus(dataclasses.replace(CONFIG, seed=1))
    assert not {d.text for d in other.train} & {d.text for d in corpus.train}
    assert {d.group for d in other.unseen} != {d.group for d in corpus.unseen}
    # Pinned, because with another split, runs would train on what earlier ones held out.
    assert [document.name for document in corpus.train[:2]] == ["gsm_symbolic:93:0", "gsm_symbolic:60:0"]


def test_without_held_out_templates_no_document_is_unseen() -> None:
    config = dataclasses.replace(with_options(documents=20, held_out_templates=0), held_out_documents=5)
    assert load_corpus(config).unseen == ()


def test_holding_out_every_template_is_refused() -> None:
    with pytest.raises(UserError) as raised:
        load_corpus(with_options(held_out_templates=85))
    assert raised.value.field == "data.source_options.held_out_templates"


@pytest.mark.parametrize(("field", "value"), [("documents", 0), ("held_out_templates", -1)])
def test_impossible_options_are_refused(field: str, value: int) -> None:
    with pytest.raises(UserError) as raised:
        GsmSymbolicOptions(**{field: value})
    assert raised.value.field == f"data.source_options.{field}"


def use_template(monkeypatch: pytest.MonkeyPatch, template: Callable[[Random, float], dict[str, Any]]) -> None:
    """Make the generator use `template` alone."""
    monkeypatch.setattr(gsm_symbolic, "load_templates", lambda: {1: template})


def test_exhausted_templates_are_an_error_and_discarded_draws_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def template(rng: Random, difficulty: float) -> dict[str, Any]:
        del difficulty
        answer = rng.randrange(20)
        if answer == 0:
            raise ValueError("no valid numbers")
        text = f"How many is {answer}?"
        return {"question": text, "metadata": {"answer_cot": "0.30000000000000004" if answer == 1 else "####"}}

    use_template(monkeypatch, template)
    config = dataclasses.replace(with_options(documents=20, held_out_templates=0), held_out_documents=0)
    with pytest.raises(UserError, match=r"in 1400 draws: 1\d of 20 for train") as raised:
        load_corpus(config)
    assert raised.value.field == "data.source_options.documents"
    loaded = load_corpus(dataclasses.replace(with_options(config, documents=12), held_out_documents=1))
    assert (len(loaded.train), len(loaded.held_out)) == (12, 1)
    assert set(loaded.skipped) == {"generator raised ValueError", "duplicate", "floating-point noise"}


def test_numbers_are_compared_without_thousands_separators_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def template(rng: Random, difficulty: float) -> dict[str, Any]:
        del difficulty
        number = rng.randrange(1000, 1150)
        text = rng.choice([f"{number:,} and 7?", f"7 and {number}?"])
        return {"question": text, "metadata": {"answer_cot": f"#### {number}"}}

    use_template(monkeypatch, template)
    loaded = load_corpus(dataclasses.replace(with_options(documents=100, held_out_templates=0), held_out_documents=25))
    train, held_out = (
        {document.text.split("#### ")[1] for document in documents} for documents in (loaded.train, loaded.held_out)
    )
    assert not train & held_out
    assert len(train) < 100 or len(held_out) < 25, "some numbers must occur in both forms"
