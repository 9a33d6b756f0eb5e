"""The verbs of `opd.backend.Backend` on torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from opd import errors
from opd.backend import Prefill
from opd.groups import drop_empty, nothing_sampled, restore_empty, rows_to_attend
from opd.ids import check_ids
from opd.objective import Objective
from opd.types import (
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
from opd_torch import gradient as gradients
from opd_torch import sampling as rollout
from opd_torch.device import tells_out_of_memory
from opd_torch.forward import attend
from opd_torch.model import (
    Model,
    copy_model,
    export_model,
    not_finite,
    read_checkpoint,
    write_adapter,
    write_checkpoint,
)
from opd_torch.optimizer import Optimizer, move_teacher
from opd_torch.processes import Processes


class TorchBackend(Processes):
    """`opd.backend.Backend` on one device per process; torch.distributed sums over processes."""

    def __init__(self, options: ModelOptions, student: Model) -> None:
        """`student`: the model of `options`, as `load_model` returns it; it is trained in place."""
        super().__init__(student.device.torch)
        self._options, self._student = options, student
        # The teacher's parameters keep requires_grad, because autocast caches only their casts.
        self._teacher = copy_model(self._student)
        self._optimizer = Optimizer(self._student.parameters)
        self._gradient: dict[str, Tensor] = {}
        self._weights = object()  # another one wherever the student's weights change

    @tells_out_of_memory
    def prefill(self, prompts: Sequence[Prompt]) -> Prefill | None:
        """Runs prompts with their graph, where it is small and of the weights' own precision."""
        check_ids(prompts, (), self._student.vocabulary)
        held = gradients.prefill_for_rollout(self._student, prompts)
        return Prefill(prompts, held, self._weights) if held else None

    @tells_out_of_memory
    def sample(
        self,
        prompts: Sequence[Prompt],
        uniforms: FloatArray,
        sampling: Sampling,
        policy: Policy = "student",
        prefill: Prefill | None = None,
    ) -> list[list[Completion]]:
        """Samples completions."""
        model = self._student if policy == "student" else self._teacher
        check_ids(prompts, (), model.vocabulary)
        if not uniforms.size:
            return nothing_sampled(uniforms)
        held = prefill and prefill.read(prompts, self._weights)
        try:
            read = gradients.to_sample(model, held) if held else None
            return rollout.sample(model, prompts, uniforms, sampling, read)
        except FloatingPointError:
            tensor, step = not_finite(model.module), self._optimizer.step
            raise errors.not_finite(Path(self._options.path), tensor, step) from None

    @tells_out_of_memory
    def accumulate(
        self,
        groups: Sequence[Group],
        objective: Objective,
        split: int = 0,
        prefill: Prefill | None = None,
    ) -> list[list[TokenStatistics]]:
        """Adds the gradient of the groups' weighted sum."""
        used = drop_empty(groups)
        if not used:
            return restore_empty(groups, [])
        check_ids((), used, self._student.vocabulary)
        cache = gradients.take(prefill, groups, used, self._weights)
        # `accumulate` adds in place, so a call that fails leaves no gradient.
        sums, self._gradient = self._gradient, {}
        policies = self._student, self._teacher
        statistics = gradients.accumulate(*policies, used, objective, sums, split, cache)
        self._gradient = sums
        return restore_empty(groups, statistics)

    @tells_out_of_memory
    def score(
        self, groups: Sequence[Group], objective: Objective, top: int = 0
    ) -> list[list[TokenStatistics]]:
        """Computes statistics without a gradient."""
        used = drop_empty(groups)
        if not used:
            return restore_empty(groups, [])
        check_ids((), used, self._student.vocabulary)
        policies = self._student, self._teacher
        return restore_empty(groups, gradients.score(*policies, used, objective, top))

    @property
    def attends(self) -> bool:
        """Whether the model has a family file."""
        return self._student.family is not None

    @tells_out_of_memory
    def attend(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        policy: Policy = "student",
    ) -> list[list[FloatArray]]:
        """The attention of completion rows to visual tokens."""
        if not self.attends:
            raise errors.no_attention(self._options.path)
        model = self._student if policy == "student" else self._teacher
        check_ids([*prompts, *chain.from_iterable(completions)], (), model.vocabulary)
        with torch.no_grad(), model.autocast():
            return attend(model, prompts, rows_to_attend(completions))

    def apply(self, update: Update) -> UpdateResult:
        """Takes one optimizer step on the gradient, summed over all processes."""
        gradient = {}
        for name, parameter in self._student.parameters.items():
            # Every process sums every parameter, even one without a gradient in this process.
            value = self._gradient.pop(name, None)
            gradient[name] = torch.zeros_like(parameter) if value is None else value
        if self.size > 1:
            for value in gradient.values():
                distributed.all_reduce(value)
        self._weights = object()
        return self._optimizer.apply(gradient, update)

    def move_teacher(self, rate: float) -> None:
        """Moves the teacher towards the student by `rate`."""
        move_teacher(self._teacher.parameters, self._student.parameters, rate)

    def save(self, folder: Path) -> None:
        """Writes both policies' trained parameters, the moments and the step count."""
        if self.rank == 0:
            write_checkpoint(folder, self._state(), self._optimizer.step)

    def load(self, folder: Path) -> None:
        """Restores a checkpoint of either backend. Raises FolderError before anything changes."""
        self._optimizer.step = read_checkpoint(folder, self._state())
        self._gradient, self._weights = {}, object()

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student as a Hugging Face model folder, or its adapters in PEFT's format."""
        write = export_model if kind == "model" else write_adapter
        if self.rank == 0:
            write(self._student, self._options, folder)

    def tensors(self, kind: Literal["student", "teacher", "gradient"]) -> dict[str, NDArray[Any]]:
        """Copies tensors to arrays, by Hugging Face name: float32, or float64 if the model computes
        in it.
        """
        student, teacher, _ = self._state()
        source = {"student": student, "teacher": teacher, "gradient": self._gradient}[kind]
        tensors = {
            name: source[name] if name in source else torch.zeros_like(parameter)
            for name, parameter in student.items()
        }
        return {name: value.detach().cpu().numpy().copy() for name, value in tensors.items()}

    @property
    def peak_memory(self) -> int:
        """The peak of bytes allocated on the GPU, or resident in the process on a CPU."""
        return self._student.device.peak_memory

    @property
    def device(self) -> str:
        """The device's name."""
        return self._student.device.name

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Student, teacher and moments."""
        return self._student.parameters, self._teacher.parameters, self._optimizer.moments
