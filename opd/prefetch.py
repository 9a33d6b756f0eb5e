"""Prefetching: another thread prepares the next item while this one is used, so that the device
never waits for image decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def prefetch(make: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """`make` of each argument, in order. Each is made on another thread while the one before it is
    used; an error is raised in its turn."""
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[Result] | None = None
        for argument in arguments:
            made, waiting = waiting, thread.submit(make, argument)
            if made is not None:
                yield made.result()
        if waiting is not None:
            yield waiting.result()
