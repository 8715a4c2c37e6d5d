"""Work done ahead of its use, in threads, with a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def read_ahead(
    executor: Executor, function: Callable[[Item], Made], items: Iterable[Item], ahead: int
) -> Iterator[Made]:
    """Results in the items' order, with at most ``ahead`` of them made or in the making before they are asked for."""
    pending: deque[Future[Made]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
