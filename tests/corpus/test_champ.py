"""The corpus of competition problems."""

from __future__ import annotations

from rpt_jax.config import DataConfig
from tests.helpers.whole_corpus import load_corpus


def test_a_document_is_a_problem_and_its_solution() -> None:
    loaded = load_corpus(DataConfig(source="champ"))
    assert (len(loaded.train), len(loaded.held_out), loaded.unseen) == (216, 54, ())
    first = next(d for d in loaded.train + loaded.held_out if d.name == "champ:P_Combinatorics_1")
    assert first.text.startswith("Let a string consist of digit 1, 2, 3. How many")
    assert first.text.endswith("\nThus, in total, there are x_6+y_6+z_6=70+99+70=239 such strings.")
