"""Work on the host beside work on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Started = TypeVar("Started")
Result = TypeVar("Result")


def start_one_ahead(
    items: Iterable[Item], start: Callable[[Item], Started], finish: Callable[[Started], Result]
) -> Iterator[Result]:
    """Yield the result of each item, in order. An item is finished after the next one was started.

    Args:
      items: such as batches of prompts.
      start: starts the work on an item, such as sampling on the devices.
      finish: does the rest, such as verification on the host, while the devices work on the next item.
    """
    waiting: list[Started] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) > 1:
            yield finish(waiting.pop(0))
    yield from map(finish, waiting)
