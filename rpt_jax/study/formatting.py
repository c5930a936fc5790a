"""How the numbers of a study are written, in the table and on the page."""

from __future__ import annotations

from rpt_jax.study.comparison import Difference, Row, Spread, score_group
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, Contrast

_TITLES = {
    BEFORE_TUNING: "questions before tuning",
    AFTER_TUNING: "questions after tuning",
}
_UNITS = {"flops": "FLOPs", "seconds": "seconds"}


def score_title(name: str) -> str:
    """Return what a score is called: "direct/hard" is "next token, direct, hard"."""
    if name in _TITLES:
        return _TITLES[name]
    words = _words(name)
    return ", ".join(["next token", *words] if words[0] in ("direct", "reasoning") else words)


def title_in_group(name: str) -> str:
    """Return what a score is called among those of its group (see `score_groups`): "direct/hard" is "direct, hard"."""
    words = _words(name)
    return ", ".join(words if words[0] in ("direct", "reasoning") else words[1:])


def contrast_title(contrast: Contrast) -> str:
    """Return what a contrast is called: "next token: reasoning, hard minus direct, hard"."""
    group = score_group(contrast.score)
    if group != score_group(contrast.minus):
        return f"{score_title(contrast.score)} minus {score_title(contrast.minus)}"
    return f"{group.replace('_', ' ')}: {title_in_group(contrast.score)} minus {title_in_group(contrast.minus)}"


def _words(name: str) -> list[str]:
    """Return the parts of a score's name; accuracy by Equation 3, "prefix", is what is meant if no measure is named."""
    return name.removesuffix("/prefix").replace("_", " ").split("/")


def percent(value: float) -> str:
    """Return a fraction in percent, without the sign."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def number(value: float) -> str:
    """Return a large number with three digits: 1.25e15."""
    return f"{value:.3g}".replace("e+", "e").replace("e0", "e") if value >= 1e5 else f"{value:,.0f}"


def budget_text(budget: float | None, matched_by: str) -> str:
    """Return a budget with its unit."""
    return "no budget" if budget is None else f"{number(budget)} {_UNITS[matched_by]}"


def spread_text(spread: Spread) -> str:
    """Return the mean, the standard deviation and the number of seeds of a score, in percent: "41.2 ± 0.8 (3)"."""
    deviation = "" if spread.deviation is None else f" ± {percent(spread.deviation)}"
    return f"{percent(spread.mean)}{deviation} ({spread.seeds})"


def difference_text(difference: Difference) -> str:
    """Return a difference with its interval in points: "+2.1 (+0.4 to +3.8; 5 pairs)", or "unpaired" in place of the pairs."""
    if difference.low is None or difference.high is None:
        return f"{points(difference.mean)} (no interval: {difference.no_interval})"
    interval = f"{points(difference.low)} to {points(difference.high)}"
    seeds = "unpaired" if difference.pairs is None else f"{difference.pairs} pairs"
    return f"{points(difference.mean)} ({interval}; {seeds})"


def seeds_text(row: Row) -> str:
    """Return how many seeds finished, and what became of the others."""
    others = [f"{count} {name}" for name, count in (("failed", row.failed), ("missing", row.missing)) if count]
    return f"{row.finished} of {row.planned}" + (f" ({', '.join(others)})" if others else "")
