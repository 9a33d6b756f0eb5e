"""Micro-batches: what runs together, so that a step of any size fits. They change no result.

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
    """Adds the gradient of a step's groups in micro-batches of at most `budget` tokens; statistics
    in the order of the groups.

    Every process makes the same number of calls: one with fewer micro-batches than another adds
    `padding`, a group of weight 0. `prefill`, of the students' prompts of all pairs, serves where
    all of them have a group and run together; else it is released before anything runs.
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
        for index, found in zip(part, rows, strict=True):
            statistics[index] = found
    for _ in range(missing):
        assert padding is not None, "a process without examples takes no part in a step"
        backend.accumulate([padding], objective)
    return statistics


def _arranged(prefill: Prefill, groups: Sequence[Group]) -> Prefill | None:
    """The prefill, arranged for these groups; None, and released, where it is not of their prompts,
    each once."""
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
    """Cuts groups into micro-batches of at most `budget` padded tokens, like lengths together to
    pad little.

    `costs` holds (prompt tokens, tokens of the longest completion) of each group. Returns indices;
    a group above the budget is alone.
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
    """Cuts a step's groups into micro-batches by their longer prompt and longest completion; see
    `microbatches`."""
    costs = [
        (max(len(group.student), len(group.teacher)), max(map(len, group.completions)))
        for group in groups
    ]
    completions = max((len(group.completions) for group in groups), default=0)
    return microbatches(costs, completions, budget)


def completions_at_once(groups: Sequence[Group], budget: int) -> int:
    """Completions of a micro-batch's group that run at once: 0 for all, fewer where a group that is
    alone is above the budget."""
    if len(groups) != 1:
        return 0
    (group,) = groups
    room = budget - max(len(group.student), len(group.teacher))
    together = max(1, room // max(map(len, group.completions)))
    return together if together < len(group.completions) else 0


def largest_count(backend: Backend, count: int) -> int:
    """The largest of all processes' counts."""
    counts: NDArray[np.float64] = np.zeros(backend.size)
    counts[backend.rank] = count
    return int(backend.total(counts).max())
