"""The protocol's verbs on MLX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd import adapters
from opd.errors import FolderError, RecipeError
from opd.objective import Objective
from opd.types import (
    Alternatives,
    Completion,
    FloatArray,
    Group,
    ModelOptions,
    Policy,
    Prompt,
    Sampling,
    TokenStatistics,
    Update,
    UpdateResult,
)
from opd_mlx import sampling as rollout
from opd_mlx.batch import Batch, Targets, lay_out, lay_out_targets
from opd_mlx.forward import CHECKPOINT_ABOVE, activation_bytes, hidden_states
from opd_mlx.model import Parameters, load_model, read_tensors, write_model, write_tensors
from opd_mlx.objective import HeadResult, default_chunk, divergence_head
from opd_mlx.optimizer import Optimizer, move_teacher, zeros

FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors")
"""What `save` writes."""


class MlxBackend:
    """`opd.backend.Backend` on MLX's default device; gradients are summed over mx.distributed where `mlx.launch` started several processes.

    Parameters are flat dictionaries of float32 arrays; the model's modules compute with whichever are bound to them.
    """

    def __init__(self, options: ModelOptions) -> None:
        self._options = options
        self._model, self._student = load_model(options)
        self._teacher = dict(self._student)
        self._optimizer = Optimizer(self._student)
        self._gradient: Parameters = {}
        self._processes = mx.distributed.init()

    @property
    def rank(self) -> int:
        """Index of this process."""
        return int(self._processes.rank())

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self._processes.size())

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Elementwise sum over all processes."""
        if self.size == 1:
            return values.copy()
        summed = mx.distributed.all_sum(mx.array(values, dtype=mx.float64), group=self._processes, stream=mx.cpu)
        return np.array(summed, dtype=np.float64)

    def sample(
        self, prompts: Sequence[Prompt], uniforms: FloatArray, sampling: Sampling, policy: Policy = "student"
    ) -> list[list[Completion]]:
        """Draws completions; see the protocol."""
        parameters = self._parameters(policy)
        with self._model.bound(parameters):
            return rollout.sample(self._model, self._model.head(parameters).astype(mx.float32), prompts, uniforms, sampling)

    def accumulate(self, groups: Sequence[Group], objective: Objective, split: int = 0) -> list[list[TokenStatistics]]:
        """Adds the gradient of the groups' weighted sum; see the protocol."""
        if not _predicted(groups):
            return _nothing(groups)
        targets = lay_out_targets(groups)
        teacher = self._hidden("teacher", groups)
        result, gradient = self._student_gradient(groups, teacher, targets, objective)
        # Each sum takes its gradient's place, and none waits for another: so what is done with is freed on the way.
        added = {name: self._gradient[name] + gradient.pop(name) for name in list(gradient)} if self._gradient else gradient
        for name in _from_the_end(added):
            mx.eval(added[name])
        statistics = _statistics(result, targets)
        self._gradient = added
        return statistics

    def score(self, groups: Sequence[Group], objective: Objective, top: int = 0) -> list[list[TokenStatistics]]:
        """Statistics without a gradient; see the protocol."""
        if not _predicted(groups):
            return _nothing(groups)
        targets = lay_out_targets(groups)
        teacher, student = self._hidden("teacher", groups), self._hidden("student", groups)
        return _statistics(self._divergence(student, teacher, targets, objective, gradient=False, top=top), targets)

    def apply(self, update: Update) -> UpdateResult:
        """One optimizer step on the gradient summed over all processes; see the protocol."""
        gradient, self._gradient = self._gradient or zeros(self._student), {}
        if self.size > 1:
            gradient = {name: mx.distributed.all_sum(value, group=self._processes) for name, value in gradient.items()}
        return self._optimizer.apply(gradient, update)

    def move_teacher(self, rate: float) -> None:
        """Moves the teacher towards the student by `rate`."""
        move_teacher(self._teacher, self._student, rate)

    def save(self, folder: Path) -> None:
        """Writes both policies' trained parameters, the moments and the step count."""
        folder.mkdir(parents=True, exist_ok=True)
        student, teacher, optimizer = FILES
        moments = {
            f"{kind}.{name}": value
            for kind, values in (("first", self._optimizer.first), ("second", self._optimizer.second))
            for name, value in self._model.to_hugging_face(values).items()
        }
        write_tensors(folder / student, self._model.to_hugging_face(self._student))
        write_tensors(folder / teacher, self._model.to_hugging_face(self._teacher))
        write_tensors(folder / optimizer, moments, step=str(self._optimizer.step))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, of either backend. Raises FolderError, and changes nothing then."""
        for name in FILES:
            if not (folder / name).is_file():
                raise FolderError(f"{folder}: no {name}, so there is nothing to resume from")
        student, teacher = (read_tensors(folder / name, self._model, self._student, [""])[0] for name in FILES[:2])
        moments, metadata = read_tensors(folder / FILES[2], self._model, self._student, ["first.", "second."])
        mx.eval(student, teacher, moments)
        # In place: the optimizer holds the same dictionary.
        self._student.update(student[""])
        self._teacher.update(teacher[""])
        self._optimizer.first, self._optimizer.second = moments["first."], moments["second."]
        self._optimizer.step = int(metadata["step"])
        self._gradient = {}

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student as a Hugging Face model folder, adapters merged, or its adapters in PEFT's format.

        Adapters over weights in 4 bits are merged into the weights as they are stored.
        """
        options = self._options.adapters
        if kind == "model":
            write_model(self._model, self._options, self._student, folder)
        elif options is None:
            raise RecipeError("there is no adapter to export: all weights were trained; export the model")
        else:
            tensors = self._model.to_hugging_face(self._student)
            adapters.write_config(folder, options, tensors, self._model.folder)
            write_tensors(folder / adapters.WEIGHTS, {f"{adapters.PREFIX}{name}": value for name, value in tensors.items()})

    def tensors(self, kind: Literal["student", "teacher", "gradient"]) -> dict[str, NDArray[np.float32]]:
        """Float32 copies by Hugging Face name."""
        source = {"student": self._student, "teacher": self._teacher, "gradient": self._gradient or zeros(self._student)}[kind]
        return {name: np.array(value) for name, value in self._model.to_hugging_face(source).items()}

    @property
    def peak_memory(self) -> int:
        """Largest number of bytes that MLX had allocated."""
        return int(mx.get_peak_memory())

    @property
    def device(self) -> str:
        """The device in words."""
        name = mx.device_info().get("device_name", "unknown device")
        return f"{name}, {'GPU' if mx.default_device().type == mx.gpu else 'CPU'}"

    def _parameters(self, policy: Policy) -> Parameters:
        return self._student if policy == "student" else self._teacher

    def _batch(self, policy: Policy, groups: Sequence[Group]) -> Batch:
        used = [group for group in groups if group.tokens]
        prompts = [group.student if policy == "student" else group.teacher for group in used]
        return lay_out(prompts, [[completion.tokens for completion in group.completions] for group in used])

    def _hidden(self, policy: Policy, groups: Sequence[Group]) -> mx.array:
        """Hidden states [M, D] of one policy, without a gradient."""
        with self._model.bound(self._parameters(policy)):
            hidden = hidden_states(self._model, self._batch(policy, groups))
            mx.eval(hidden)
        return hidden

    def _student_gradient(
        self, groups: Sequence[Group], teacher: mx.array, targets: Targets, objective: Objective
    ) -> tuple[HeadResult, Parameters]:
        """The divergence of all rows, and its gradient to every trained parameter, which is not evaluated yet.

        `mx.vjp` builds the backward before the divergence is known: the cotangent it is given is a buffer, filled in when the forward
        half has run and the head's chunks have been evaluated one by one. So the forward runs once, and what it keeps is what the
        backward reads.
        """
        batch = self._batch("student", groups)
        again = activation_bytes(self._model, batch) > CHECKPOINT_ABOVE
        names = [name for name in self._student if name != self._model.head_name or self._model.tied]

        def trunk(*values: mx.array) -> mx.array:
            with self._model.bound(dict(zip(names, values, strict=True))):
                return hidden_states(self._model, batch, again).astype(mx.float32)

        cotangent = mx.zeros((len(batch.rows), self._model.head(self._student).shape[1]))
        mx.eval(cotangent)
        (hidden,), slopes = mx.vjp(trunk, [self._student[name] for name in names], [cotangent])
        mx.eval(hidden)
        result = self._divergence(hidden, teacher, targets, objective, gradient=True, top=0)
        np.copyto(np.array(cotangent, copy=False), np.array(result.hidden_gradient))
        gradient = dict(zip(names, slopes, strict=True))
        if result.head_gradient is not None:
            head = self._model.head_name
            gradient[head] = gradient[head] + result.head_gradient if head in gradient else result.head_gradient
        return result, gradient

    def _divergence(
        self, student: mx.array, teacher: mx.array, targets: Targets, objective: Objective, gradient: bool, top: int
    ) -> HeadResult:
        student_head, teacher_head = self._model.head(self._student), self._model.head(self._teacher)
        return divergence_head(
            student,
            student_head,
            teacher,
            teacher_head,
            targets.tokens,
            targets.logprobs,
            targets.weights,
            objective,
            chunk=default_chunk(len(student_head)),
            gradient=gradient,
            train_head=self._model.frozen_head is None,
            top=top,
        )


def _from_the_end(names: Iterable[str]) -> list[str]:
    """Names in the order in which a backward meets them: the language model from its last layer down, then what makes image features."""

    def place(name: str) -> tuple[bool, int]:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return not name.startswith("language_model."), -numbers[0] if numbers else 1

    return sorted(names, key=place)


def _predicted(groups: Sequence[Group]) -> int:
    return sum(group.tokens for group in groups)


def _nothing(groups: Sequence[Group]) -> list[list[TokenStatistics]]:
    empty = np.zeros(0, np.float32)
    return [[TokenStatistics(empty, empty, empty, empty, empty, empty) for _ in group.completions] for group in groups]


def _statistics(result: HeadResult, targets: Targets) -> list[list[TokenStatistics]]:
    """The result's rows as one record a completion."""
    names = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "ratio", "divergence")
    rows: Any = targets.ragged(mx.stack([getattr(result, name) for name in names], axis=1))
    pairs = (
        (result.student_top_tokens, result.student_top_logprobs),
        (result.teacher_top_tokens, result.teacher_top_logprobs),
    )
    tops = [[targets.ragged(part) for part in pair if part is not None] for pair in pairs if pair[0] is not None]
    return [
        [
            TokenStatistics(*np.ascontiguousarray(values.T), *(Alternatives(*(part[group][member] for part in top)) for top in tops))
            for member, values in enumerate(members)
        ]
        for group, members in enumerate(rows)
    ]
