"""Computes the student's gradient: prompts, completions, head, and the backwards to parameters.

The student's prompts run once. Their backward waits until the backwards of all slices of
completions have summed the gradients of the prompts' cache.

Legend: U different tokens that some rows look up, V vocabulary, D hidden width, M completion
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.backend import Prefill
from opd.groups import slices
from opd.objective import Objective
from opd.types import Group, Policy, Prompt, TokenStatistics
from opd_mlx.batch import Batch, Prefixes, lay_out, lay_out_targets
from opd_mlx.footprint import activation_bytes, recompute_share
from opd_mlx.forward import PromptCache, complete, hidden_states, prefill, warm
from opd_mlx.kernels.backward import Backward
from opd_mlx.model import Model, Parameters
from opd_mlx.objective import HeadResult, default_chunk, divergence_head
from opd_mlx.sampling import PrefilledPrompts

LOOKED_UP = "language_model.looked_up"
"""The name, among gradients, of the gradient of the embedding rows that completions look up."""


class PendingBackward:
    """A forward of some rows of the student, and the backward to parameters and other inputs, by
    name.

    If the embedding is trained, the forward takes the rows [U, D] that are looked up instead of the
    embedding, so that the gradient is not a table [V, D].
    """

    def __init__(
        self,
        model: Model,
        parameters: Parameters,
        names: Sequence[str],
        tokens: mx.array,
        run: Callable[..., Sequence[mx.array]],
        inputs: Mapping[str, mx.array] | None = None,
        looked_up_ids: NDArray[np.int32] | None = None,
    ) -> None:
        """Traces `run`, a function of `tokens` [N] and `inputs`.

        `names` are the `parameters` that `run` reads, without the embedding. `looked_up_ids` [U],
        sorted, contain the tokens of all slices; by default they are those in `tokens`.
        """
        self.parameters = parameters
        names, inputs = list(names), inputs or {}
        primals = [parameters[name] for name in names]
        self.looked_up_ids: mx.array | None = None
        if model.embedding_name in parameters:
            ids = np.array(tokens)
            unique = np.unique(ids) if looked_up_ids is None else looked_up_ids
            names.append(model.embedding_name)
            self.looked_up_ids = mx.array(unique)
            tokens = mx.array(np.searchsorted(unique, ids).astype(np.int32))
            primals.append(parameters[model.embedding_name][self.looked_up_ids])

        def bound(*values: mx.array) -> Sequence[mx.array]:
            with model.bound(dict(zip(names, values, strict=False))):
                return run(tokens, *values[len(names) :])

        self._names = [*names, *inputs]
        self._backward = Backward(bound, [*primals, *inputs.values()])

    @property
    def outputs(self) -> list[mx.array]:
        """The outputs of `run`; evaluate them before `start`."""
        return self._backward.outputs

    def start(self, gradients: Sequence[mx.array]) -> Parameters:
        """The gradients by name, from the float32 `gradients` of the outputs.

        That of the embedding has the rows of the `looked_up_ids`. They are not evaluated yet, and
        this object drops all arrays.
        """
        self.parameters = {}
        return dict(zip(self._names, self._backward.start(gradients), strict=True))


@dataclass(frozen=True)
class RolloutPrefill:
    """The student's prompts as a rollout ran them, with a backward for the same step."""

    prefixes: Prefixes
    pending: PendingBackward

    @property
    def cache(self) -> PromptCache:
        """What completions need of the prompts."""
        outputs = self.pending.outputs
        return list(zip(outputs[::2], outputs[1::2], strict=True))


@dataclass(frozen=True)
class Slice:
    """A slice of the completions of all groups, and the batch for each policy."""

    groups: list[Group]
    student: Batch
    teacher: Batch


def prefill_for_rollout(
    model: Model, student: Parameters, prompts: Sequence[Prompt]
) -> RolloutPrefill | None:
    """The prompts as a rollout runs them, for their backward.

    None if they are too many to keep their activations, or if that would keep casts of all weights.
    """
    tokens = sum(map(len, prompts))
    if model.dtype != mx.float32 or tokens > model.device.prefill_tokens:
        return None
    batch = lay_out(prompts, [[] for _ in prompts])
    if activation_bytes(model, batch) > model.device.checkpoint_above:
        return None
    with model.bound(student):
        warm(model, prompts)
    pending = run_prompts(model, student, batch.prefixes, 0)
    mx.eval(pending.outputs)
    return RolloutPrefill(batch.prefixes, pending)


def to_sample(held: object) -> PrefilledPrompts:
    """Returns the prompts that a prefill holds, for `sampling.sample`."""
    assert isinstance(held, RolloutPrefill)
    return PrefilledPrompts(held.prefixes, held.cache)


def take(
    prefill: Prefill | None, groups: Sequence[Group], used: Sequence[Group], weights: object
) -> tuple[list[int], PendingBackward | None]:
    """Takes the prompts from `prefill`; also returns the order of the `used` groups, by index, in
    which the prefill holds their prompts.

    Returns None for the prompts, and the groups' order, without a prefill. If some `groups` are not
    used, releases the prefill and returns the same.
    """
    if prefill is None or len(used) < len(groups):
        if prefill is not None:
            prefill.release()
        return list(range(len(used))), None
    held = prefill.take([group.student for group in groups], weights)
    assert isinstance(held, RolloutPrefill)
    return sorted(range(len(used)), key=prefill.order.__getitem__), held.pending


def accumulate(
    model: Model,
    student: Parameters,
    teacher: Parameters,
    gradient: Parameters,
    groups: Sequence[Group],
    objective: Objective,
    split: int,
    prompts: PendingBackward | None,
) -> list[list[TokenStatistics]]:
    """Adds the gradient of all groups to `gradient`, by parameter; returns the statistics of all
    completions, none of which may be empty.

    `split` completions of a group run together; 0 for all. `prompts` are the student's prompts, if
    they have run. Accumulates in place, because a second gradient might not fit; if an error is
    raised, `gradient` is lost.
    """
    parts = [
        Slice(some, _lay_out_groups("student", some), _lay_out_groups("teacher", some))
        for some in slices(groups, split)
    ]
    activations = activation_bytes(model, parts[0].student)
    recompute = recompute_share(model, activations, student, gradient)
    teacher_hidden = _teacher_hidden(model, teacher, parts)
    if prompts is None:
        prefixes = parts[0].student.prefixes
        warm(model, prefixes.sources)
        prompts = run_prompts(model, _cast(model, student), prefixes, recompute)
        mx.eval(prompts.outputs)
    ids = _looked_up_ids(groups)
    heads = model.head(student), model.head(teacher)
    statistics: list[list[TokenStatistics]] = [[] for _ in groups]
    for part, hidden in zip(parts, teacher_hidden, strict=True):
        result, gradients = _completions(
            model, part, hidden, prompts, ids, heads, objective, recompute
        )
        for rows, records in zip(statistics, result.records(part.groups), strict=True):
            rows += records
        del result
        _add(gradient, gradients, model.device.gradient_bytes)
    _finish_prompts(model, student, gradient, prompts, ids)
    return statistics


def score(
    model: Model,
    student: Parameters,
    teacher: Parameters,
    groups: Sequence[Group],
    objective: Objective,
    top: int,
) -> list[list[TokenStatistics]]:
    """Statistics of all completions, none of which may be empty; with `top`, also the `top` most
    likely tokens of both policies.
    """
    hidden: dict[Policy, mx.array] = {}
    policies: dict[Policy, Parameters] = {"teacher": teacher, "student": student}
    for policy, parameters in policies.items():
        with model.bound(parameters):
            hidden[policy] = hidden_states(model, _lay_out_groups(policy, groups))
            mx.eval(hidden[policy])
    heads = model.head(student), model.head(teacher)
    both = hidden["student"], hidden["teacher"]
    result = _divergence(model, *both, heads, groups, objective, gradient=False, top=top)
    return result.records(groups)


def run_prompts(
    model: Model, parameters: Parameters, prefixes: Prefixes, recompute: float
) -> PendingBackward:
    """Runs the student's prompts; the outputs are the prompts' cache, layer by layer."""

    def run(tokens: mx.array) -> list[mx.array]:
        return list(chain(*prefill(model, replace(prefixes, tokens=tokens), recompute)))

    return PendingBackward(model, parameters, _traced(model, parameters), prefixes.tokens, run)


def _divergence(
    model: Model,
    student: mx.array,
    teacher: mx.array,
    heads: tuple[mx.array, mx.array],
    groups: Sequence[Group],
    objective: Objective,
    gradient: bool,
    top: int = 0,
) -> HeadResult:
    """Runs `divergence_head` on both policies' hidden states [M, D] of the completions of `groups`.

    `heads` [V, D] are the student's and the teacher's.
    """
    targets = lay_out_targets(groups)
    return divergence_head(
        student,
        heads[0],
        teacher,
        heads[1],
        targets.tokens,
        targets.logprobs,
        targets.weights,
        objective,
        chunk=default_chunk(len(heads[0])),
        block_bytes=model.device.head_block_bytes,
        gradient=gradient,
        train_head=model.frozen_head is None,
        top=top,
    )


def _lay_out_groups(policy: Policy, groups: Sequence[Group]) -> Batch:
    """The batch of one policy's prompts and all completions of `groups`."""
    prompts = [group.student if policy == "student" else group.teacher for group in groups]
    tokens = [[completion.tokens for completion in group.completions] for group in groups]
    return lay_out(prompts, tokens)


def _traced(model: Model, student: Parameters, completions: bool = False) -> list[str]:
    """The names of the trained parameters that prompts read, or with `completions` those that
    completions read, which excludes the vision tower's.

    The gradients of head and embedding are computed separately.
    """
    separate = (model.head_name, model.embedding_name)
    names = [name for name in student if name not in separate]
    if completions:
        names = [name for name in names if not name.startswith(model.family.vision)]
    return names


def _cast(model: Model, student: Parameters) -> Parameters:
    """Casts the student's layers to the compute dtype, once for prompts and completions."""
    cast = {name: student[name].astype(model.dtype) for name in _traced(model, student)}
    return {**student, **cast}


def _teacher_hidden(model: Model, teacher: Parameters, parts: Sequence[Slice]) -> list[mx.array]:
    """The teacher's final hidden states [M, D] of each slice.

    The teacher runs before the student, so that the teacher's casts and cache are freed before the
    student's are made.
    """
    prefixes, hidden = parts[0].teacher.prefixes, []
    with model.bound(teacher):
        warm(model, prefixes.sources)
        cache = prefill(model, prefixes)
        mx.eval(cache)
        for part in parts:
            hidden.append(complete(model, part.teacher, cache))
            mx.eval(hidden[-1])
    return hidden


def _completions(
    model: Model,
    part: Slice,
    teacher: mx.array,
    prompts: PendingBackward,
    ids: NDArray[np.int32],
    heads: tuple[mx.array, mx.array],
    objective: Objective,
    recompute: float,
) -> tuple[HeadResult, list[Parameters]]:
    """Runs a slice; returns the statistics, and the gradients of parameters, prompts' cache, and
    looked-up embedding rows, which are not evaluated yet.
    """
    parameters, batch = prompts.parameters, part.student

    def run(tokens: mx.array, *flat: mx.array) -> list[mx.array]:
        cache = list(zip(flat[::2], flat[1::2], strict=True))
        hidden = complete(model, replace(batch, tokens=tokens), cache, recompute)
        return [hidden.astype(mx.float32)]

    inputs = {_cache_name(place): value for place, value in enumerate(prompts.outputs)}
    names = _traced(model, parameters, completions=True)
    rows = PendingBackward(model, parameters, names, batch.tokens, run, inputs, ids)
    mx.eval(rows.outputs)
    result = _divergence(
        model, rows.outputs[0], teacher, heads, part.groups, objective, gradient=True
    )
    assert result.hidden_gradient is not None
    gradients = rows.start([result.hidden_gradient])
    if rows.looked_up_ids is not None:
        gradients[LOOKED_UP] = gradients.pop(model.embedding_name)
    if result.head_gradient is None:
        return result, [gradients]
    return result, [gradients, {model.head_name: result.head_gradient}]


def _finish_prompts(
    model: Model,
    student: Parameters,
    gradient: Parameters,
    prompts: PendingBackward,
    ids: NDArray[np.int32],
) -> None:
    """Runs the prompts' backward from the gradients of the prompts' cache, and adds the parameters'
    gradients.
    """
    caches = [gradient.pop(_cache_name(place)) for place in range(len(prompts.outputs))]
    gradients = prompts.start(caches)
    del caches
    embedding, looked_up_ids = model.embedding_name, prompts.looked_up_ids
    if looked_up_ids is None:
        _add(gradient, [gradients], model.device.gradient_bytes)
        return
    rows = [
        (looked_up_ids, gradients.pop(embedding)),
        (mx.array(ids), gradient.pop(LOOKED_UP)),
    ]
    _add(gradient, [gradients], model.device.gradient_bytes)
    _add_embedding_rows(gradient, embedding, student[embedding].shape, rows)


def _looked_up_ids(groups: Sequence[Group]) -> NDArray[np.int32]:
    """All tokens that completions look up, sorted; they include 0, which pads completions."""
    tokens = [completion.tokens for group in groups for completion in group.completions]
    tokens += [group.student.tokens[-1:] for group in groups]
    return np.unique(np.concatenate([np.zeros(1, np.int32), *tokens])).astype(np.int32)


def _cache_name(place: int) -> str:
    """The name, among gradients, of a layer's keys (even `place`) or values (odd `place`)."""
    return f"language_model.{place // 2}.cache.{place % 2}"


def _add(sums: Parameters, gradients: list[Parameters], most: int) -> None:
    """Adds gradients to `sums` in float32, and evaluates them in the order of a backward.

    This order is the language model from the last layer to the first, then vision. At most `most`
    bytes, and at most one layer, are evaluated together. Gradients are removed from `gradients`, so
    that arrays are freed early.
    """

    def order(name: str) -> tuple[bool, int]:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return not name.startswith("language_model."), -numbers[0] if numbers else 1

    pending: list[str] = []
    names = sorted(dict.fromkeys(chain(*gradients)), key=order)
    for name, following in zip(names, [*names[1:], None], strict=True):
        for part in gradients:
            if name in part:
                gradient = part.pop(name).astype(mx.float32)
                sums[name] = sums[name] + gradient if name in sums else gradient
                del gradient
        pending.append(name)
        size = sum(sums[pending_name].nbytes for pending_name in pending)
        if following is None or order(following) != order(name) or size > most:
            mx.eval([sums[pending_name] for pending_name in pending])
            pending.clear()


def _add_embedding_rows(
    sums: Parameters,
    name: str,
    shape: Sequence[int],
    rows: Sequence[tuple[mx.array, mx.array]],
) -> None:
    """Adds `rows`, pairs of ids [U] and gradients [U, D], to the sum of the embedding of `shape`
    (V, D), in one pass.
    """
    ids, gradients = (mx.concatenate(list(parts)) for parts in zip(*rows, strict=True))
    table = sums.pop(name) if name in sums else mx.zeros(shape)
    sums[name] = table.at[ids].add(gradients)
    del table
    mx.eval(sums[name])
