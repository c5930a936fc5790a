"""The headline, and what a study does not show: each sentence is there if its condition holds, and only then."""

from __future__ import annotations

import dataclasses

from rpt_jax.study.comparison import compare_arms
from rpt_jax.study.limits import GENERAL_LIMITS, headline, limits
from rpt_jax.study.outcome import Contrast, Outcome, StudyOutcomes, Unit
from tests.helpers.study import outcome, score, study

WOBBLE = (0.003, 0.004, -0.004, 0.002, -0.002, -0.003)


def clear(arm: str = "rpt", gain: float = 0.3) -> list[Outcome]:
    """Return six seeds of base, and of an arm that is clearly different from it."""
    pairs = [
        (outcome("base", seed, None, 0.2), outcome(arm, seed, 1e12, 0.2 + gain + noise))
        for seed, noise in enumerate(WOBBLE)
    ]
    return [each for pair in pairs for each in pair]


def specific(of: StudyOutcomes) -> list[str]:
    """Return the sentences that depend on the data."""
    found = limits(of, compare_arms(of))
    assert found[-len(GENERAL_LIMITS) :] == list(GENERAL_LIMITS)
    return found[: -len(GENERAL_LIMITS)]


def added(of: StudyOutcomes, unlike: StudyOutcomes) -> list[str]:
    """Return the sentences that the one study has, and the other does not."""
    return [sentence for sentence in specific(of) if sentence not in specific(unlike)]


CLEAR = study(clear())


def test_the_uncertainty_of_the_test_and_a_single_budget_limit_a_clear_difference() -> None:
    test, budgets = specific(CLEAR)
    assert "400" in test and "reasoning, hard" in test
    assert "scale" in budgets and "has 1" in budgets
    several = [dataclasses.replace(each, budget=factor * 1e12) for factor in (2, 3, 4) for each in clear()[1::2]]
    assert not any("scale" in sentence for sentence in specific(study(clear() + several)))


def test_an_interval_that_contains_0_is_named() -> None:
    (sentence,) = added(study(clear(gain=0.001)), CLEAR)[:1]
    assert "rpt" in sentence and "base" in sentence and "contains 0" in sentence


def test_units_that_did_not_finish_are_named() -> None:
    (sentence,) = added(dataclasses.replace(CLEAR, missing=(Unit("rpt", 9, 1e12),)), CLEAR)
    assert "rpt" in sentence and "base" not in sentence


def test_few_seeds_are_named_and_so_is_what_they_do_to_an_exact_test() -> None:
    few, exact = added(study(clear()[:4]), CLEAR)[:2]
    assert "rpt" in few and "base" in few
    assert "0.333" in exact, "two and two independent seeds have no p-value below 2 / 6"
    three = added(study(clear()[:6]), CLEAR)
    assert few not in three and any("0.1:" in sentence for sentence in three)


def test_several_intervals_are_counted() -> None:
    both = [each for each in clear("ntp") if each.arm == "ntp"] + clear()
    found = added(study(both, ("base", "rpt", "ntp")), CLEAR)
    assert any("2 intervals" in sentence for sentence in found)


def test_the_difference_of_two_references_is_one_interval_and_a_contrast_another() -> None:
    both = [each for each in clear("ntp") if each.arm == "ntp"] + clear()
    contrasts = (Contrast("reasoning/hard", "reasoning/easy"),)
    easy = [
        dataclasses.replace(each, scores={**each.scores, "reasoning/easy": score(0.5 + 0.01 * (i * i % 7))})
        for i, each in enumerate(both)
    ]
    of = study(easy, ("base", "rpt", "ntp"), references=("base", "rpt", "ntp"), contrasts=contrasts)
    # Three pairs of arms in one score, two in the other, where rpt and ntp have the same values, and the contrast in three arms.
    assert any("There are 8 intervals" in sentence for sentence in specific(of))


def test_compute_that_differs_from_the_budget_is_named() -> None:
    def spend(factor: float) -> StudyOutcomes:
        return study([dataclasses.replace(each, flops=factor * each.flops) for each in clear()])

    assert added(spend(1.04), CLEAR) == []
    (sentence,) = added(spend(1.07), CLEAR)
    assert "rpt" in sentence and "+7%" in sentence
    matched_by_seconds = dataclasses.replace(spend(1.07), matched_by="seconds")
    assert any("-100%" in sentence for sentence in specific(matched_by_seconds)), "1e12 seconds were not spent"


def test_the_headline_is_about_the_main_score_at_the_largest_budget() -> None:
    smaller = [dataclasses.replace(each, budget=5e11) for each in clear(gain=0.1) if each.arm == "rpt"]
    of = study(smaller + clear(gain=-0.1))
    (sentence,) = headline(of, compare_arms(of))
    assert "rpt -10.0" in sentence and "worse" in sentence and "better" not in sentence
    (sentence,) = headline(CLEAR, compare_arms(CLEAR))
    assert "rpt +30.0" in sentence and "better" in sentence
    unsure = study(clear(gain=0.001))
    assert "no difference" in headline(unsure, compare_arms(unsure))[0]
    single = study(clear()[:2])
    assert "too few seeds" in headline(single, compare_arms(single))[0]
    empty = study([], missing=(Unit("rpt", 0, 1e12),))
    assert len(headline(empty, compare_arms(empty))) == 1
