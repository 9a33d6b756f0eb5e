"""The verbs of `opd.backend.Backend` on MLX."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

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
from opd_mlx import gradient
from opd_mlx import sampling as rollout
from opd_mlx.device import tells_out_of_memory
from opd_mlx.forward import attend
from opd_mlx.model import (
    Checkpoint,
    Model,
    Parameters,
    not_finite,
    read_checkpoint,
    write_adapter,
    write_checkpoint,
    write_model,
)
from opd_mlx.optimizer import Optimizer, move_teacher, zeros
from opd_mlx.processes import Processes


class MlxBackend(Processes):
    """`opd.backend.Backend` on an MLX device.

    Parameters are flat dictionaries of float32 arrays, which are bound to the model's modules for a
    computation.
    """

    attends = True  # the layers of every family have `visual_weights`

    def __init__(self, options: ModelOptions, model: Model, student: Parameters) -> None:
        """`model` and the trained parameters `student`: those of `options`, as `load_model` returns
        them; the dictionary `student` is changed in place."""
        super().__init__()
        self._options, self._model, self._student = options, model, student
        self._teacher = dict(self._student)
        self._optimizer = Optimizer(self._student, self._model.device)
        self._gradient: Parameters = {}
        self._weights = object()  # another one wherever the student's weights change

    @tells_out_of_memory
    def prefill(self, prompts: Sequence[Prompt]) -> Prefill | None:
        """Runs prompts with their graph, where it is small and of the weights' own precision."""
        check_ids(prompts, (), self._model.vocabulary)
        held = gradient.prefill_for_rollout(self._model, self._student, prompts)
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
        check_ids(prompts, (), self._model.vocabulary)
        if not uniforms.size:
            return nothing_sampled(uniforms)
        parameters = self._student if policy == "student" else self._teacher
        with self._model.bound(parameters):
            head = self._model.head(parameters).astype(mx.float32)
            held = prefill and prefill.read(prompts, self._weights)
            read = gradient.to_sample(held) if held else rollout.read_prompts(self._model, prompts)
            try:
                return rollout.sample(self._model, head, read, uniforms, sampling)
            except FloatingPointError:
                tensor, step = not_finite(self._model, parameters), self._optimizer.step
                raise errors.not_finite(self._model.folder, tensor, step) from None

    @tells_out_of_memory
    def accumulate(
        self,
        groups: Sequence[Group],
        objective: Objective,
        split: int = 0,
        prefill: Prefill | None = None,
    ) -> list[list[TokenStatistics]]:
        """Adds the gradient of the groups' sum, in place; a call that fails leaves none."""
        used = drop_empty(groups)
        if not used:
            return restore_empty(groups, [])
        check_ids((), used, self._model.vocabulary)
        sums, self._gradient = self._gradient, {}
        order, prompts = gradient.take(prefill, groups, used, self._weights)
        inputs = [used[index] for index in order], objective, split, prompts
        computed = gradient.accumulate(self._model, self._student, self._teacher, sums, *inputs)
        self._gradient = sums
        statistics = dict(zip(order, computed, strict=True))
        return restore_empty(groups, [statistics[index] for index in range(len(used))])

    @tells_out_of_memory
    def score(
        self, groups: Sequence[Group], objective: Objective, top: int = 0
    ) -> list[list[TokenStatistics]]:
        """Computes statistics without a gradient."""
        used = drop_empty(groups)
        if not used:
            return restore_empty(groups, [])
        check_ids((), used, self._model.vocabulary)
        inputs = self._student, self._teacher, used, objective, top
        return restore_empty(groups, gradient.score(self._model, *inputs))

    @tells_out_of_memory
    def attend(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        policy: Policy = "student",
    ) -> list[list[FloatArray]]:
        """The attention of completion rows to visual tokens."""
        check_ids([*prompts, *chain.from_iterable(completions)], (), self._model.vocabulary)
        parameters = self._student if policy == "student" else self._teacher
        with self._model.bound(parameters):
            return attend(self._model, prompts, rows_to_attend(completions))

    def apply(self, update: Update) -> UpdateResult:
        """Takes one optimizer step on the gradient, summed over all processes."""
        sums = self._gradient or zeros(self._student)
        self._gradient, self._weights = {}, object()
        if self.size > 1:
            # In the same order on all processes, because only the order matches the sums.
            group = self._processes
            sums = {k: mx.distributed.all_sum(sums[k], group=group) for k in self._student}
        return self._optimizer.apply(sums, update)

    def move_teacher(self, rate: float) -> None:
        """Moves the teacher towards the student by `rate`."""
        move_teacher(self._teacher, self._student, rate, self._model.device)

    def save(self, folder: Path) -> None:
        """Writes both policies' trained parameters, the moments and the step count."""
        state = self._optimizer
        trained = self._student, self._teacher, state.first, state.second, state.step
        if self.rank == 0:
            write_checkpoint(folder, self._model, Checkpoint(*trained))

    def load(self, folder: Path) -> None:
        """Restores a checkpoint of either backend. Raises FolderError before anything changes."""
        read = read_checkpoint(folder, self._model, self._student)
        # In place, because the optimizer holds the same dictionary.
        self._student.update(read.student)
        self._teacher.update(read.teacher)
        self._optimizer.first, self._optimizer.second = read.first, read.second
        self._optimizer.step = read.step
        self._gradient, self._weights = {}, object()

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student as a Hugging Face model folder, or its adapters in PEFT's format."""
        write = write_model if kind == "model" else write_adapter
        if self.rank == 0:
            write(self._model, self._options, self._student, folder)

    def tensors(
        self, kind: Literal["student", "teacher", "gradient"]
    ) -> dict[str, NDArray[np.float32]]:
        """Copies tensors to float32 arrays, by Hugging Face name."""
        held = {"student": self._student, "teacher": self._teacher, "gradient": self._gradient}
        source = held[kind] or zeros(self._student)
        return {k: np.array(value) for k, value in self._model.to_hugging_face(source).items()}

    @property
    def peak_memory(self) -> int:
        """The peak of bytes that MLX has allocated."""
        return int(mx.get_peak_memory())

    @property
    def device(self) -> str:
        """The device's name, and whether it is a GPU."""
        return f"{self._model.device.name}, {'GPU' if self._model.device.gpu else 'CPU'}"
