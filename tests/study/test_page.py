"""The page and the Markdown of a study: everything is there, nothing is loaded, and hostile names stay text."""

from __future__ import annotations

import dataclasses
import html.parser
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rpt_jax.study.comparison import compare_arms, score_names
from rpt_jax.study.formatting import budget_text, percent, score_title
from rpt_jax.study.outcome import StudyOutcomes, Unit
from rpt_jax.study.page import main_figures, write_page
from tests.helpers.study import large_study, outcome, study

HOSTILE = ("base", '<script>alert(1)</script>"', "a | b\n# $\\frac{1}{2}$ {{ 7 * 7 }}", "_[x](http://example.com)&amp;")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(html.parser.HTMLParser):
    """Reads a page, and checks that its elements are closed in order.

    Attributes:
      tags: every tag, with its attributes.
      text: all text between them.
      unclosed: the elements that are open.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.unclosed: list[str] = []
        self.feed(page)
        self.close()
        assert not self.unclosed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyOutcomes, str, str]:
    """Return a study with hostile names, its page and its Markdown."""
    of = large_study(HOSTILE, budgets=2, seeds=3)
    page, markdown, _ = write_page(of, tmp_path_factory.mktemp("study"))
    return of, page.read_text(), markdown.read_text()


def test_the_page_runs_nothing_and_loads_nothing(hostile: tuple[StudyOutcomes, str, str]) -> None:
    reader = Reader(hostile[1])
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "iframe", "link", "img", "object", "embed", "base", "form"}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), tag
    assert "url(http" not in hostile[1] and "@import" not in hostile[1]


def test_names_are_shown_as_they_are(hostile: tuple[StudyOutcomes, str, str]) -> None:
    text = " ".join(Reader(hostile[1]).text.split())
    for name in HOSTILE:
        assert " ".join(name.split()) in text


def test_every_mean_failure_and_missing_unit_is_shown(hostile: tuple[StudyOutcomes, str, str]) -> None:
    of, page, markdown = hostile
    text = Reader(page).text
    for row in compare_arms(of):
        for spread in row.scores.values():
            assert percent(spread.mean) in text and percent(spread.mean) in markdown
    for each in (text, markdown):
        assert "out of memory" in each
        assert "1 of 3" in each
        assert of.commands[0] in each
    for title in ("direct, hard", "reasoning, hard", "before tuning", "after tuning"):
        assert title in text


def test_figures_are_well_formed(hostile: tuple[StudyOutcomes, str, str]) -> None:
    of, page, _ = hostile
    figures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(figures) == len(score_names(of.outcomes)) + 2 + 4, (
        "scores, two contrasts, two of tuning for each budget; no fit"
    )
    for figure in figures:
        assert "viewBox" in figure.attrib and "width" not in figure.attrib
    identifiers = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)


def test_markdown_tables_have_as_many_cells_in_each_row(hostile: tuple[StudyOutcomes, str, str]) -> None:
    blocks = [block for block in hostile[2].split("\n\n") if block.startswith("|")]
    assert blocks
    for block in blocks:
        lines = block.splitlines()
        assert all(line.startswith("|") for line in lines)
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_study_with_four_budgets_shows_its_fits(tmp_path: Path) -> None:
    of = large_study(("base", "rpt", "ntp"), budgets=4, seeds=3)
    page = write_page(of, tmp_path)[0].read_text()
    assert page.count("<svg") > len(score_names(of.outcomes)) + 2 + 4
    assert "α = " in page and "C_mid = " in page


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(study([], missing=(Unit("rpt", 0, 1e12),)), id="nothing finished"),
        pytest.param(study([], references=()), id="no units"),
        pytest.param(study([outcome("rpt", 0, 1e12, 0.0)], matched_by="seconds"), id="one unit"),
        pytest.param(study([outcome("base", 0, None, 1.0)]), id="base alone"),
    ],
)
def test_an_incomplete_study_has_a_page(of: StudyOutcomes, tmp_path: Path) -> None:
    page, markdown, *_ = write_page(of, tmp_path)
    assert of.name in Reader(page.read_text()).text
    assert markdown.read_text().startswith("# A study")


def test_the_picture_shows_fine_tuning_after_the_largest_budget_that_most_arms_have() -> None:
    of = large_study(("base", "first", "second"), budgets=3, seeds=3)
    largest, second = of.budgets()[-1], of.budgets()[-2]
    fewer = tuple(outcome for outcome in of.outcomes if (outcome.arm, outcome.budget) != ("second", largest))
    for shown, outcomes in ((largest, of.outcomes), (second, fewer)):
        drawn = dataclasses.replace(of, outcomes=outcomes)
        titles = [figure.title for figure in main_figures(drawn, compare_arms(drawn), [])]
        assert [title for title in titles if "during tuning" in title] == [
            f"questions during tuning, {budget_text(shown, 'flops')}{by}" for by in ("", ", by FLOPs")
        ]


def test_the_measure_of_equation_3_is_not_named() -> None:
    assert score_title("altered_reasoning/own/prefix") == "altered reasoning, own"
    assert score_title("altered_reasoning/own/first_token") == "altered reasoning, own, first token"
