"""Computes the student's gradient: prompts, completions, head, and the two backwards.

The completions' backward ends at the prompts' cache. The gradients of all slices are summed there,
and the prompts' backward begins with the sum. So prompts run once, forward and backward, even if
completions run in several slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from opd.backend import Prefill
from opd.groups import slices
from opd.objective import Objective
from opd.types import Group, IntArray, Prompt, TokenStatistics
from opd_torch.batch import lay_out_completions, lay_out_prefixes, lay_out_targets
from opd_torch.footprint import activation_bytes, recompute_share
from opd_torch.forward import PromptCache, complete, concatenate_caches, prefill, reorder
from opd_torch.model.load import Model
from opd_torch.objective import HeadResult, default_chunk, divergence_head
from opd_torch.sampling import PrefilledPrompts


def to_sample(model: Model, held: object) -> PrefilledPrompts:
    """Returns the prompts that a prefill holds without their graph, for `sampling.sample`."""
    assert isinstance(held, PrefilledPrompts)
    with torch.no_grad():
        return PrefilledPrompts(held.prefixes, concatenate_caches(model, [list(held.cache)]))


def take(
    prefill: Prefill | None, groups: Sequence[Group], used: Sequence[Group], weights: object
) -> PromptCache | None:
    """Takes the prompts' cache with the graph from `prefill`, in the order of `groups`.

    Returns None without a prefill. If some groups are not `used`, releases the prefill and returns
    None.
    """
    if prefill is None:
        return None
    if len(used) < len(groups):
        prefill.release()
        return None
    held, order = prefill.take([group.student for group in groups], weights), prefill.order
    assert isinstance(held, PrefilledPrompts)
    return held.cache if sorted(order) == list(order) else reorder(held.cache, order)


def prefill_for_rollout(model: Model, prompts: Sequence[Prompt]) -> PrefilledPrompts | None:
    """Runs a rollout's prompts with a graph.

    Returns None if the graph would be large, or would hold casts of all weights.
    """
    masters = next(iter(model.parameters.values())).dtype
    if model.family is None or model.dtype != masters:
        return None
    tokens = sum(map(len, prompts))
    if tokens > model.device.prefill_tokens:
        return None
    prefixes = lay_out_prefixes(prompts, model.device.torch)
    if activation_bytes(model, prefixes) > model.device.checkpoint_above:
        return None
    return PrefilledPrompts(prefixes, prefill(model, prefixes))


def accumulate(
    student: Model,
    teacher: Model,
    groups: Sequence[Group],
    objective: Objective,
    sums: dict[str, Tensor],
    completions_at_once: int = 0,
    cache: PromptCache | None = None,
) -> list[list[TokenStatistics]]:
    """Adds the gradient of all groups to `sums`, by parameter; returns the statistics of all
    completions, none of which may be empty.

    `completions_at_once` completions of a group run together; 0 for all. `cache` is the cache of
    the student's prompts with the graph, if they have run. Accumulates in place, because a second
    gradient might not fit; if an error is raised, `sums` are lost.
    """
    try:
        for name, parameter in student.parameters.items():
            parameter.grad = sums.pop(name, None)
        parts = slices(groups, completions_at_once)
        statistics = _differentiate(student, teacher, groups, parts, objective, cache)
        for name, parameter in student.parameters.items():
            if parameter.grad is not None:
                value = parameter.grad
                sums[name] = value.to_dense() if value.is_sparse else value
        return statistics
    finally:
        for parameter in student.parameters.values():
            parameter.grad = None


def _differentiate(
    student: Model,
    teacher: Model,
    groups: Sequence[Group],
    parts: Sequence[Sequence[Group]],
    objective: Objective,
    cache: PromptCache | None,
) -> list[list[TokenStatistics]]:
    """Runs all groups slice by slice, and adds the gradient to the `grad` of the student's
    parameters; returns the statistics.
    """
    prompts = [group.student for group in groups]
    teacher_hidden = _hidden(teacher, [group.teacher for group in groups], parts)
    prefixes = lay_out_prefixes(prompts, student.device.torch)
    batches = [lay_out_completions(prefixes, _tokens(part)) for part in parts]
    wanted = max(activation_bytes(student, batch) for batch in batches)
    recompute = recompute_share(student, wanted)
    statistics: list[list[TokenStatistics]] = [[] for _ in groups]
    # An outer autocast keeps casts of weights, so that the graphs of all slices share them. If all
    # layers are recomputed, no graph holds casts, and each slice's casts are freed.
    shared = torch.autocast(student.device.torch.type, enabled=False)
    with nullcontext() if recompute == 1 else shared:
        with student.autocast():
            cache = cache or prefill(student, prefixes, recompute)
        leaves = [(_leaf(first), _leaf(second)) for first, second in cache]
        for part, part_teacher_hidden in zip(parts, teacher_hidden, strict=True):
            with student.autocast():
                hidden = complete(student, batches.pop(0), leaves, recompute)
            result = _divergence(
                student,
                teacher,
                hidden.detach(),
                part_teacher_hidden,
                part,
                objective,
                gradient=True,
            )
            _add_head_gradient(student, result)
            assert result.hidden_gradient is not None
            hidden.backward(result.hidden_gradient.to(hidden.dtype))
            for rows, records in zip(statistics, result.records(part), strict=True):
                rows += records
            del hidden, result
    _backward_through_prompts(cache, leaves)
    return statistics


def score(
    student: Model,
    teacher: Model,
    groups: Sequence[Group],
    objective: Objective,
    top: int = 0,
) -> list[list[TokenStatistics]]:
    """Statistics of all completions, none of which may be empty; with `top`, also the `top` most
    likely tokens of both policies.
    """
    (teacher_hidden,) = _hidden(teacher, [group.teacher for group in groups], [groups])
    (hidden,) = _hidden(student, [group.student for group in groups], [groups])
    result = _divergence(student, teacher, hidden, teacher_hidden, groups, objective, top=top)
    return result.records(groups)


def _hidden(
    model: Model, prompts: Sequence[Prompt], parts: Sequence[Sequence[Group]]
) -> list[Tensor]:
    """Final hidden states [M, D] of each slice's completions over `prompts`, without a gradient.

    Each call has a separate autocast, so that one policy's casts are freed before the other runs.
    """
    prefixes = lay_out_prefixes(prompts, model.device.torch)
    with torch.no_grad(), model.autocast():
        cache = prefill(model, prefixes)
        return [
            complete(model, lay_out_completions(prefixes, _tokens(part)), cache) for part in parts
        ]


def _divergence(
    student: Model,
    teacher: Model,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    groups: Sequence[Group],
    objective: Objective,
    gradient: bool = False,
    top: int = 0,
) -> HeadResult:
    """Runs `divergence_head` on both policies' hidden states [M, D] of completions."""
    targets = lay_out_targets(groups, student.device.torch)
    student_head = student.head.detach().to(student.dtype)
    teacher_head = student_head
    if teacher.head is not student.head:
        teacher_head = teacher.head.detach().to(student.dtype)
    return divergence_head(
        student_hidden.to(student.dtype),
        student_head,
        teacher_hidden.to(student.dtype),
        teacher_head,
        targets.tokens,
        targets.logprobs,
        targets.weights,
        objective,
        chunk=default_chunk(len(student_head)),
        block_bytes=student.device.head_block_bytes,
        gradient=gradient,
        train_head=student.head_name in student.parameters,
        top=top,
    )


def _tokens(groups: Sequence[Group]) -> list[list[IntArray]]:
    """The tokens of each group's completions."""
    return [[completion.tokens for completion in group.completions] for group in groups]


def _add_head_gradient(student: Model, result: HeadResult) -> None:
    """Adds the head's gradient to `grad`, and frees it in `result`.

    This comes before the backward, which adds the rows that a tied embedding looked up.
    """
    if result.head_gradient is None:
        return
    head = student.parameters[student.head_name]
    if head.grad is None:
        head.grad = result.head_gradient
    else:
        head.grad.add_(result.head_gradient)
    result.head_gradient = None  # as large as the head


def _leaf(x: Tensor) -> Tensor:
    """A copy of `x` that starts a separate graph; it shares the data."""
    return x.detach().requires_grad_(x.requires_grad)


def _backward_through_prompts(cache: PromptCache, leaves: PromptCache) -> None:
    """Runs the prompts' backward, from the gradients that the completions left in `leaves`."""
    tensors, gradients = [], []
    for layer_cache, layer_leaves in zip(cache, leaves, strict=True):
        for x, leaf in zip(layer_cache, layer_leaves, strict=True):
            if leaf.grad is not None:
                tensors.append(x)
                gradients.append(leaf.grad)
    if tensors:
        torch.autograd.backward(tensors, gradients)
