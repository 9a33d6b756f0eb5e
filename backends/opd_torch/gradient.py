"""The student's gradient: prompts, completions, head, and the two backwards.

The completions' backward ends at what the prompts left in the cache; the sum of its slices there is
where the prompts' backward begins. So prompts run once, forward and backward, however many slices
the completions run in.
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
from opd_torch.footprint import activation_bytes, prompt_bytes, recompute_share
from opd_torch.forward import PromptCache, complete, concatenate_caches, prefill, reorder
from opd_torch.model.load import Model
from opd_torch.objective import HeadResult, default_chunk, divergence_head
from opd_torch.sampling import PrefilledPrompts


def to_sample(model: Model, held: object) -> PrefilledPrompts:
    """What a prefill holds, as `sampling.sample` takes it: without the graph."""
    assert isinstance(held, PrefilledPrompts)
    with torch.no_grad():
        return PrefilledPrompts(held.prefixes, concatenate_caches(model, [list(held.cache)]))


def take(
    prefill: Prefill | None, groups: Sequence[Group], used: Sequence[Group], weights: object
) -> PromptCache | None:
    """The prompts' cache with its graph, in the order of `groups`. None where there is no prefill,
    or where not all groups are `used`: it is released then.
    """
    if prefill is None:
        return None
    if len(used) < len(groups):
        prefill.release()
        return None
    held, order = prefill.take([one.student for one in groups], weights), prefill.order
    assert isinstance(held, PrefilledPrompts)
    return held.cache if sorted(order) == list(order) else reorder(held.cache, order)


def prefill_for_rollout(model: Model, prompts: Sequence[Prompt]) -> PrefilledPrompts | None:
    """Runs a rollout's prompts with a graph; None where the graph is not small, or would hold casts
    of all weights.
    """
    masters = next(iter(model.parameters.values())).dtype
    if model.family is None or model.dtype != masters:
        return None
    tokens = sum(map(len, prompts))
    if tokens > model.device.prefill_tokens:
        return None
    if prompt_bytes(model, prompts, tokens) > model.device.checkpoint_above:
        return None
    prefixes = lay_out_prefixes(prompts, model.device.torch)
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
    """Statistics of all completions, of which none is empty; adds their gradient to `sums`, by
    parameter.

    `completions_at_once`: completions of a group that run together; 0 for all. `cache`: what the
    student's prompts keep, with their graph, where they have run. Adds in place, since a second
    gradient might not fit: where it raises, `sums` are lost.
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
    """Statistics of all groups, slice by slice; adds their gradient to the `grad` of the student's
    parameters.
    """
    prompts = [group.student for group in groups]
    teacher_hidden = _hidden(teacher, [group.teacher for group in groups], parts)
    prefixes = lay_out_prefixes(prompts, student.device.torch)
    batches = [lay_out_completions(prefixes, _tokens(part)) for part in parts]
    wanted = max(activation_bytes(student, batch) for batch in batches)
    recompute = recompute_share(student, wanted)
    statistics: list[list[TokenStatistics]] = [[] for _ in groups]
    # Graphs that hold casts of weights share them. Where all layers are recomputed no graph does:
    # each slice's casts are freed.
    shared = torch.autocast(student.device.torch.type, enabled=False)
    with nullcontext() if recompute == 1 else shared:
        with student.autocast():
            cache = cache or prefill(student, prefixes, recompute)
        leaves = [(_leaf(first), _leaf(second)) for first, second in cache]
        for part, taught in zip(parts, teacher_hidden, strict=True):
            with student.autocast():
                hidden = complete(student, batches.pop(0), leaves, recompute)
            result = _divergence(
                student, teacher, hidden.detach(), taught, part, objective, gradient=True
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
    """Statistics of all completions, of which none is empty; with `top`, both policies' likeliest
    alternatives.
    """
    (taught,) = _hidden(teacher, [group.teacher for group in groups], [groups])
    (hidden,) = _hidden(student, [group.student for group in groups], [groups])
    result = _divergence(student, teacher, hidden, taught, groups, objective, top=top)
    return result.records(groups)


def _hidden(
    model: Model, prompts: Sequence[Prompt], parts: Sequence[Sequence[Group]]
) -> list[Tensor]:
    """Final hidden states [M, D] of each slice's completions over `prompts`, without a gradient.

    In an autocast of its own, so that one policy's casts are freed before the other's.
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
    """The divergence of both policies' hidden states [M, D] at the completions of `groups`."""
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
    """The completions' tokens of every group."""
    return [[completion.tokens for completion in group.completions] for group in groups]


def _add_head_gradient(student: Model, result: HeadResult) -> None:
    """Adds the head's gradient, before the backward adds the rows that a tied embedding looked up;
    frees it in `result`.
    """
    if result.head_gradient is None:
        return
    head = student.parameters[student.head_name]
    if head.grad is None:
        head.grad = result.head_gradient
    else:
        head.grad.add_(result.head_gradient)
    result.head_gradient = None  # a table of the vocabulary


def _leaf(x: Tensor) -> Tensor:
    """`x` as the start of a graph of its own."""
    return x.detach().requires_grad_(x.requires_grad)


def _backward_through_prompts(cache: PromptCache, leaves: PromptCache) -> None:
    """The prompts' backward, from the gradient that completions left at what the prompts keep."""
    pairs = [
        (x, leaf.grad)
        for kept, read in zip(cache, leaves, strict=True)
        for x, leaf in zip(kept, read, strict=True)
        if leaf.grad is not None
    ]
    if pairs:
        tensors, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, gradients)
