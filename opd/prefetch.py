"""Prefetching: another thread prepares the next item while this one is used, so that the device
never waits for image decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def prefetch(make: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """Yields `make(argument)` for each argument, in order. Another thread makes the next result
    while the caller uses the current one. An error of `make` is raised where its result would have
    been yielded."""
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[Result] | None = None
        for argument in arguments:
            ready, waiting = waiting, thread.submit(make, argument)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()
