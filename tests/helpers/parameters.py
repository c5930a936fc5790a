"""Parameters of tests of which only a part runs in the quick suite."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def mostly_slow(values: Iterable[object], *quick: object) -> list[object]:
    """Return `values` as parameters of a test, all but those in `quick` marked slow. A tuple has a value for each name.

    Raises: ValueError, if one of `quick` is not a value.
    """
    values = list(values)
    if missing := [value for value in quick if value not in values]:
        raise ValueError(f"not among the values: {missing}")

    def slow(value: object) -> object:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]
