"""The protocol's verbs on torch."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from opd import errors
from opd.errors import FolderError, ModelError, RecipeError, nearest
from opd.groups import drop_empty, restore_empty, slices
from opd.ids import check_ids
from opd.models import adapters
from opd.objective import Objective
from opd.types import (
    Completion,
    FloatArray,
    Group,
    IntArray,
    ModelOptions,
    Policy,
    Prompt,
    Sampling,
    TokenStatistics,
    Update,
    UpdateResult,
)
from opd_torch import sampling as rollout
from opd_torch.batch import Targets, lay_out_completions, lay_out_prefixes, lay_out_targets
from opd_torch.footprint import CHECKPOINT_ABOVE, activation_bytes, prompt_bytes
from opd_torch.forward import Memory, complete, joined_memory, remember, reordered
from opd_torch.model import (
    DTYPES,
    copy_model,
    head_name,
    load_model,
    master_dtype,
    merge,
    not_finite,
    read_model,
    read_tensors,
    trained_parameters,
    write_model,
    write_tensors,
)
from opd_torch.objective import HeadResult, default_chunk, divergence_head
from opd_torch.optimizer import Optimizer, move_teacher

FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors")
"""What `save` writes."""


class TorchBackend:
    """`opd.backend.Backend` on one device of this process; gradients are summed over torch.distributed where it is initialised."""

    def __init__(self, options: ModelOptions, device: torch.device) -> None:
        if options.dtype not in DTYPES:
            raise ModelError(f"unknown dtype '{options.dtype}'; {nearest(options.dtype, DTYPES)}")
        self._options, self._device, self._dtype = options, device, DTYPES[options.dtype]
        self._student = load_model(options, device)
        # The teacher's parameters keep requires_grad, without which autocast would cast them again in every layer call.
        self._teacher = copy_model(self._student)
        self._parameters, self._teacher_parameters = trained_parameters(self._student), trained_parameters(self._teacher)
        self._head = head_name(self._student)
        self._optimizer = Optimizer(self._parameters)
        self._gradient: dict[str, Tensor] = {}
        # The student's pass over the prompts of the last rollout, graph included: `accumulate` needs the very same one.
        self._kept: tuple[Sequence[Prompt], list[Memory]] | None = None

    @property
    def rank(self) -> int:
        """Index of this process."""
        return distributed.get_rank() if distributed.is_initialized() else 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return distributed.get_world_size() if distributed.is_initialized() else 1

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Elementwise sum over all processes."""
        if self.size == 1:
            return values.copy()
        summed = torch.from_numpy(values.astype(np.float64)).to(self._device)
        distributed.all_reduce(summed)
        return np.asarray(summed.cpu().numpy(), dtype=np.float64)

    def sample(
        self, prompts: Sequence[Prompt], uniforms: FloatArray, sampling: Sampling, policy: Policy = "student"
    ) -> list[list[Completion]]:
        """Draws completions; see the protocol."""
        check_ids(prompts, (), self._student.get_input_embeddings().num_embeddings)
        model = self._student if policy == "student" else self._teacher
        if not uniforms.size:
            return [[Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False) for _ in row] for row in uniforms]
        self._kept = None
        memory = None
        if policy == "student" and sampling.temperature > 0 and self._keeps(prompts):
            prefixes = lay_out_prefixes(prompts, self._device)
            kept = remember(model, prefixes)
            self._kept = prompts, kept
            with torch.no_grad():
                memory = joined_memory(model, [list(kept)])
        # Autocast keeps no casts of weights in inference mode, and would make them anew at every token.
        with torch.no_grad(), self._autocast():
            if memory is None:
                prefixes, memory = rollout.read(model, prompts, self._device)
            with torch.no_grad() if self._dtype == torch.bfloat16 else torch.inference_mode():
                try:
                    return rollout.sample(model, prefixes, memory, uniforms, sampling, self._dtype)
                except FloatingPointError:
                    raise errors.not_finite(Path(self._options.path), not_finite(model), self._optimizer.step) from None

    def accumulate(self, groups: Sequence[Group], objective: Objective, split: int = 0) -> list[list[TokenStatistics]]:
        """Adds the gradient of the groups' weighted sum; see the protocol."""
        used = drop_empty(groups)
        if not used:
            return restore_empty(groups, [])
        check_ids((), used, self._student.get_input_embeddings().num_embeddings)
        parts = slices(used, split)
        # What there is of a gradient is added to in place: two would not fit where one does.
        gradient, self._gradient = self._gradient, {}
        # Before the teacher runs, so that what serves none of these prompts is freed.
        memory = self._recalled([group.student for group in used])
        teacher = self._hidden("teacher", used, parts)
        try:
            for name, parameter in self._parameters.items():
                parameter.grad = gradient.pop(name, None)
            statistics = self._differentiate(used, parts, teacher, memory, objective)
            found = ((name, parameter.grad) for name, parameter in self._parameters.items() if parameter.grad is not None)
            self._gradient = {name: value.to_dense() if value.is_sparse else value for name, value in found}
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None
        return restore_empty(groups, statistics)

    def score(self, groups: Sequence[Group], objective: Objective, top: int = 0) -> list[list[TokenStatistics]]:
        """Statistics without a gradient; see the protocol."""
        used = drop_empty(groups)
        if not used:
            return restore_empty(groups, [])
        check_ids((), used, self._student.get_input_embeddings().num_embeddings)
        (teacher,), (student,) = (self._hidden(policy, used, [used]) for policy in ("teacher", "student"))
        targets = lay_out_targets(used, self._device)
        return restore_empty(groups, self._divergence(student, teacher, targets, objective, top=top).records(used))

    def apply(self, update: Update) -> UpdateResult:
        """One optimizer step on the gradient summed over all processes; see the protocol."""
        self._kept = None
        # Every process sums every parameter, whether or not a gradient reached it here.
        gradient = {name: self._gradient.pop(name, None) for name in self._parameters}
        whole = {name: torch.zeros_like(self._parameters[name]) if value is None else value for name, value in gradient.items()}
        if self.size > 1:
            for value in whole.values():
                distributed.all_reduce(value)
        return self._optimizer.apply(whole, update)

    def move_teacher(self, rate: float) -> None:
        """Moves the teacher towards the student by `rate`."""
        move_teacher(self._teacher_parameters, self._parameters, rate)

    def save(self, folder: Path) -> None:
        """Writes both policies' trained parameters, the moments and the step count."""
        folder.mkdir(parents=True, exist_ok=True)
        student, teacher, optimizer = FILES
        write_tensors(folder / student, self._parameters)
        write_tensors(folder / teacher, self._teacher_parameters)
        write_tensors(folder / optimizer, self._moments(), step=str(self._optimizer.step))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, of either backend. Raises FolderError, and changes nothing then."""
        expected = (self._parameters, self._teacher_parameters, self._moments())
        for name in FILES:
            if not (folder / name).is_file():
                raise FolderError(f"{folder}: no {name}")
        self._kept = None
        read = [read_tensors(folder / name, tensors) for name, tensors in zip(FILES, expected, strict=True)]
        with torch.no_grad():
            for tensors, (values, _) in zip(expected, read, strict=True):
                for name, tensor in tensors.items():
                    tensor.copy_(values[name])
        self._optimizer.step = int(read[2][1]["step"])
        self._gradient = {}

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student as a Hugging Face model folder, adapters merged, or its adapters in PEFT's format.

        Adapters over weights in 4 bits are merged into the weights as they are stored.
        """
        source, options = Path(self._options.path), self._options.adapters
        if kind == "adapter":
            if options is None:
                raise RecipeError("there is no adapter to export: all weights were trained; export the model")
            adapters.write_config(folder, options, self._parameters, source)
            write_tensors(folder / adapters.WEIGHTS, {f"{adapters.PREFIX}{name}": value for name, value in self._parameters.items()})
        elif options is None:
            write_model(self._student, source, folder)
        else:
            merged = read_model(source, master_dtype(self._options.dtype))
            merge(merged, self.tensors("student"), options.scale)
            write_model(merged, source, folder)

    def tensors(self, kind: Literal["student", "teacher", "gradient"]) -> dict[str, NDArray[np.float32]]:
        """Float32 copies by Hugging Face name."""
        source = {"student": self._parameters, "teacher": self._teacher_parameters, "gradient": self._gradient}[kind]
        return {
            name: source[name].detach().float().cpu().numpy().copy() if name in source else np.zeros(tuple(parameter.shape), np.float32)
            for name, parameter in self._parameters.items()
        }

    @property
    def peak_memory(self) -> int:
        """Largest number of bytes allocated on the GPU, or held by the process on the CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident if sys.platform == "darwin" else resident * 1024

    @property
    def device(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else cpu()

    def _autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)
        return context

    def _hidden(self, policy: Policy, groups: Sequence[Group], parts: Sequence[Sequence[Group]]) -> list[Tensor]:
        """Hidden states of one policy for each of the groups' parts, without a gradient.

        In an autocast of its own, so that one policy's casts are freed before the other's.
        """
        model = self._student if policy == "student" else self._teacher
        prefixes = lay_out_prefixes([group.student if policy == "student" else group.teacher for group in groups], self._device)
        with torch.no_grad(), self._autocast():
            memory = remember(model, prefixes)
            return [complete(model, lay_out_completions(prefixes, _tokens(part)), memory) for part in parts]

    def _differentiate(
        self,
        groups: Sequence[Group],
        parts: Sequence[Sequence[Group]],
        teacher: list[Tensor],
        memory: list[Memory] | None,
        objective: Objective,
    ) -> list[list[TokenStatistics]]:
        """Statistics of all groups; adds their gradient to that of the student's parameters. `teacher`: hidden states of each part;
        `memory`: what the student's layers keep of the prompts, where they have run.

        The parts' backward ends at what the prompts left in memory; their sum there is where the prompts' backward begins.
        """
        model, prompts = self._student, [group.student for group in groups]
        prefixes = lay_out_prefixes(prompts, self._device)
        batches = [lay_out_completions(prefixes, _tokens(part)) for part in parts]
        again = self._again(max(activation_bytes(model, batch, self._dtype.itemsize) for batch in batches))
        statistics: list[list[TokenStatistics]] = [[] for _ in groups]
        # Graphs that hold casts of weights share them; where all layers are computed again none does, and each part's are freed with it.
        with nullcontext() if again == 1 else torch.autocast(self._device.type, enabled=False):
            with self._autocast():
                memory = memory or remember(model, prefixes, again)
            leaves = [tuple(x.detach().requires_grad_(x.requires_grad) for x in layer) for layer in memory]
            for part, its_teacher in zip(parts, teacher, strict=True):
                with self._autocast():
                    student = complete(model, batches.pop(0), leaves, again)
                targets = lay_out_targets(part, self._device)
                result = self._divergence(student.detach(), its_teacher, targets, objective, gradient=True)
                assert result.hidden_gradient is not None
                if result.head_gradient is not None:
                    # Before the backward, which adds the rows that a tied embedding looked up.
                    head = self._parameters[self._head]
                    head.grad = result.head_gradient if head.grad is None else head.grad.add_(result.head_gradient)
                    result.head_gradient = None  # a table of the vocabulary
                student.backward(result.hidden_gradient.to(student.dtype))
                for rows, its in zip(statistics, result.records(part), strict=True):
                    rows += its
                del student, result
        ends = [(x, leaf.grad) for layer, its in zip(memory, leaves, strict=True) for x, leaf in zip(layer, its, strict=True)]
        ends = [(x, gradient) for x, gradient in ends if gradient is not None]
        if ends:
            torch.autograd.backward(*zip(*ends, strict=True))
        return statistics

    def _again(self, wanted: int) -> float:
        """The share of layers to compute again in a backward that would hold `wanted` bytes of activations."""
        if wanted <= CHECKPOINT_ABOVE:
            return 0.0
        return max(0.0, 1 - max(0, self._spare()) / wanted) if self._device.type == "cuda" else 1.0

    def _spare(self) -> int:
        """Bytes of the GPU that nothing will need before the gradient is there; a tenth is left for what no formula knows."""
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        parameters = self._parameters.values()
        gradient = sum(parameter.nbytes for parameter in parameters if parameter.grad is None)
        casts = sum(parameter.numel() for parameter in parameters) * self._dtype.itemsize if self._dtype == torch.bfloat16 else 0
        return int(0.9 * (torch.cuda.mem_get_info(self._device)[0] + unused - gradient - casts))

    def _keeps(self, prompts: Sequence[Prompt]) -> bool:
        """Whether a rollout's pass over its prompts is kept for `accumulate`: where it is small, and holds no casts of all weights."""
        if self._student.family is None or self._dtype != master_dtype(self._options.dtype):
            return False
        tokens = sum(map(len, prompts))
        return tokens <= rollout.PREFILL_TOKENS and prompt_bytes(self._student, prompts, tokens, self._dtype.itemsize) <= CHECKPOINT_ABOVE

    def _recalled(self, prompts: Sequence[Prompt]) -> list[Memory] | None:
        """What was kept of just these prompts, in their order; it serves once."""
        kept, self._kept = self._kept, None
        places = {id(prompt): place for place, prompt in enumerate(kept[0])} if kept else {}
        order = [places.get(id(prompt), -1) for prompt in prompts]
        if kept is None or sorted(order) != list(range(len(kept[0]))):
            return None
        return kept[1] if order == sorted(order) else reordered(kept[1], order)

    def _divergence(
        self, student: Tensor, teacher: Tensor, targets: Targets, objective: Objective, gradient: bool = False, top: int = 0
    ) -> HeadResult:
        student_head, teacher_head = (model.lm_head.weight for model in (self._student, self._teacher))
        shared = teacher_head is student_head
        student_head = student_head.detach().to(self._dtype)
        return divergence_head(
            student.to(self._dtype),
            student_head,
            teacher.to(self._dtype),
            student_head if shared else teacher_head.detach().to(self._dtype),
            targets.tokens,
            targets.logprobs,
            targets.weights,
            objective,
            chunk=default_chunk(len(student_head)),
            gradient=gradient,
            train_head=self._head in self._parameters,
            top=top,
        )

    def _moments(self) -> dict[str, Tensor]:
        first = {f"first.{name}": value for name, value in self._optimizer.first.items()}
        return first | {f"second.{name}": value for name, value in self._optimizer.second.items()}


def cpu() -> str:
    """The CPU in words."""
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _tokens(groups: Sequence[Group]) -> list[list[IntArray]]:
    return [[completion.tokens for completion in group.completions] for group in groups]
