"""Work on the host beside work on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Started = TypeVar("Started")
Result = TypeVar("Result")


def finish_one_behind(started: Iterable[Started], finish: Callable[[Started], Result]) -> Iterator[Result]:
    """Yield `finish` of each item, in order. An item is finished after the next one was started.

    Args:
      started: starts the work on an item when it is iterated over, such as sampling a batch of prompts on the devices.
      finish: does the rest, such as verification on the host, while the devices work on the next item.
    """
    waiting: list[Started] = []
    for item in started:
        waiting.append(item)
        if len(waiting) > 1:
            yield finish(waiting.pop(0))
    yield from map(finish, waiting)
