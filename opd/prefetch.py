"""Preparing the next while this one is used: decoding images and cutting them into patches take no time of the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def ahead(make: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """`make` of each argument in order, each on another thread while the result before it is used; an error is raised in its turn."""
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[Result] | None = None
        for argument in arguments:
            made, waiting = waiting, thread.submit(make, argument)
            if made is not None:
                yield made.result()
        if waiting is not None:
            yield waiting.result()
