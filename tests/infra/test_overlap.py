"""Items are finished one after the other, each after the next one was started."""

from __future__ import annotations

import pytest

from rpt_jax.infra.overlap import finish_one_behind


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], []),
        ([1], ["start 1", "finish 1"]),
        ([1, 2, 3], ["start 1", "start 2", "finish 1", "start 3", "finish 2", "finish 3"]),
    ],
)
def test_an_item_is_finished_after_the_next_one_was_started(items: list[int], expected: list[str]) -> None:
    events: list[str] = []

    def start(item: int) -> int:
        events.append(f"start {item}")
        return 10 * item

    def finish(started: int) -> int:
        events.append(f"finish {started // 10}")
        return started + 1

    assert list(finish_one_behind(map(start, items), finish)) == [10 * item + 1 for item in items]
    assert events == expected
