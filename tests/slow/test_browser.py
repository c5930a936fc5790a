"""The page of a run in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rpt_jax.run_page.build import write_page
from tests.helpers.browser import CHROMIUM, Page, browser
from tests.helpers.run_pages import HOSTILE, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def choose(page: Page, name: str, value: str) -> None:
    page.run(
        f"document.getElementById('filters').elements['{name}'].value = '{value}';"
        "document.getElementById('filters').dispatchEvent(new Event('input'))"
    )


def shown(page: Page) -> int:
    return int(page.run("document.getElementById('count').textContent.split(' ')[0]"))


def count(page: Page, selector: str) -> int:
    return page.run(f"document.querySelectorAll('{selector}').length")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_draws_filters_and_opens_rollouts(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    path = write_page([write_run(tmp_path, steps=6, prompts=2, samples=4)], tmp_path / "report.html")
    page.errors.clear()
    page.open(path.as_uri(), width=width, dark=dark)
    assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert count(page, "#charts .js-plotly-plot") >= 5 and count(page, "#scaling-chart.js-plotly-plot") == 1

    # Filters.
    assert shown(page) == 12 and count(page, "#group .sample") == 4
    choose(page, "from", "5")
    assert shown(page) == 4
    choose(page, "reward", "none")
    assert shown(page) == 1 and count(page, "#group .sample.right") == 0
    choose(page, "from", "3")
    choose(page, "reward", "all")
    assert shown(page) == 2 and count(page, "#group .sample.right") == 4
    choose(page, "status", "wrong bytes")
    assert shown(page) == 0
    page.run("document.querySelector('#filters [type=reset]').click(); new Promise(done => setTimeout(done, 50))")
    assert shown(page) == 12
    choose(page, "difficulty", "easy")
    assert shown(page) == 6
    choose(page, "kind", "after")
    assert shown(page) == 6

    # Keyboard, metrics and text.
    page.run("document.getElementById('groups').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))")
    assert page.run("document.querySelector('#groups [aria-selected=true]').id") == "item-1"
    page.run("document.getElementById('metric-search').value = 'mfu'")
    page.run("document.getElementById('metric-search').dispatchEvent(new Event('input'))")
    assert page.run("document.getElementById('metric-list').textContent") == "speed/mfu"
    page.run("document.querySelector('#metric-list button').click()")
    assert count(page, '[id="chart-speed/mfu"].js-plotly-plot') == 1
    page.run("document.querySelector('#document button').click()")
    assert count(page, "#position .sample") == 8
    for color in ("direct-before", "direct-after", "reasoning-before", "reasoning-after", "gain"):
        page.run(f"document.getElementById('color').value = '{color}'")
        page.run("document.getElementById('color').dispatchEvent(new Event('change'))")
        assert count(page, "#document [style]") > 0
    assert page.errors == []


def test_a_hostile_corpus_runs_no_script_and_makes_no_request(page: Page, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "<img src=x onerror=alert(1)>", hostile=HOSTILE), write_run(tmp_path / "b", steps=4)]
    path = write_page(runs, tmp_path / "report.html")
    page.errors.clear()
    page.open(path.as_uri())
    page.run("document.querySelector('#document button').click(); new Promise(done => setTimeout(done, 500))")
    assert "broken" not in page.run("document.title")
    assert count(page, "img") == 0
    assert HOSTILE in page.run("document.querySelector('#group .sample pre').textContent")
    assert page.errors == []


def test_a_script_that_comes_into_the_page_does_not_run(page: Page, tmp_path: Path) -> None:
    """The policy of the page holds even if something were not escaped."""
    path = write_page([write_run(tmp_path)], tmp_path / "report.html")
    page.open(path.as_uri())
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: \"document.title = 'broken'\"}))"
    )
    assert page.run("document.title") != "broken"
