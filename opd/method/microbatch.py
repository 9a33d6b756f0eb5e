"""Cuts a step into micro-batches, so that a step of any size fits in memory. Micro-batches do not
change results.

Legend: n completions of a prompt; budgets are padded tokens, prompts and completions together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opd.backend import Backend, Prefill
from opd.objective import Objective
from opd.types import Group, TokenStatistics


def accumulate(
    backend: Backend,
    groups: Sequence[Group],
    objective: Objective,
    budget: int,
    padding: Group | None,
    prefill: Prefill | None = None,
) -> list[list[TokenStatistics]]:
    """Adds the gradient of a step's groups in micro-batches of at most `budget` tokens. Returns the
    statistics in the order of the groups.

    Every process makes the same number of calls: a process with fewer micro-batches than another
    adds calls with `padding`, a group of weight 0. `prefill` holds the student prompts of all
    pairs. It is used if every pair has a group and one micro-batch holds all groups; otherwise it
    is released before anything runs.
    """
    parts = microbatches_of(groups, budget)
    missing = largest_count(backend, len(parts)) - len(parts)
    statistics: list[list[TokenStatistics]] = [[] for _ in groups]
    if prefill is not None:
        prefill = _arranged(prefill, [groups[index] for part in parts[:1] for index in part])
    for part in parts:
        together = [groups[index] for index in part]
        at_once = completions_at_once(together, budget)
        rows = backend.accumulate(together, objective, at_once, prefill)
        for index, row in zip(part, rows, strict=True):
            statistics[index] = row
    for _ in range(missing):
        assert padding is not None, "a process without examples takes no part in a step"
        backend.accumulate([padding], objective)
    return statistics


def _arranged(prefill: Prefill, groups: Sequence[Group]) -> Prefill | None:
    """The prefill with the order of these groups. If the student prompts of the groups are not
    exactly the prompts of the prefill, releases it and returns None."""
    order = []
    for group in groups:
        order += [place for place, one in enumerate(prefill.prompts) if one is group.student][:1]
    if len(order) == len(groups) and sorted(order) == list(range(len(prefill.prompts))):
        prefill.order = tuple(order)
        return prefill
    prefill.release()
    return None


def microbatches(
    costs: Sequence[tuple[int, int]], completions: int, budget: int
) -> list[list[int]]:
    """Cuts groups into micro-batches of at most `budget` padded tokens; groups of similar lengths
    run together, which keeps padding small.

    `costs`: (prompt tokens, tokens of the longest completion) of each group. `completions`: the
    largest number of completions in a group. Returns the indices of each micro-batch's groups; a
    group above the budget is alone.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index], reverse=True)
    cut: list[list[int]] = []
    longest_prompt = longest_completion = 0
    for index in order:
        prompt, completion = costs[index]
        padded = max(longest_prompt, prompt) + completions * max(longest_completion, completion)
        if cut and padded * (len(cut[-1]) + 1) <= budget:
            cut[-1].append(index)
            longest_completion = max(longest_completion, completion)
        else:
            cut.append([index])
            longest_prompt, longest_completion = prompt, completion
    return cut


def microbatches_of(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Cuts a step's groups into `microbatches`, by the longer prompt and the longest completion of
    each group."""
    costs = [
        (max(len(group.student), len(group.teacher)), max(map(len, group.completions)))
        for group in groups
    ]
    completions = max((len(group.completions) for group in groups), default=0)
    return microbatches(costs, completions, budget)


def completions_at_once(groups: Sequence[Group], budget: int) -> int:
    """The number of completions of each group that run at once in a micro-batch; 0: all. It is
    fewer if a group that is alone exceeds the budget."""
    if len(groups) != 1:
        return 0
    (group,) = groups
    completion_budget = budget - max(len(group.student), len(group.teacher))
    together = max(1, completion_budget // max(map(len, group.completions)))
    return together if together < len(group.completions) else 0


def largest_count(backend: Backend, count: int) -> int:
    """The maximum of `count` over all processes; every process calls it."""
    counts: NDArray[np.float64] = np.zeros(backend.size)
    counts[backend.rank] = count
    return int(backend.total(counts).max())
