"""The protocol's verbs on MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd import errors
from opd.errors import FolderError, RecipeError
from opd.ids import check_ids
from opd.models import adapters
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
from opd_mlx import sampling as rollout
from opd_mlx.batch import Batch, Prefixes, Targets, lay_out, lay_out_targets
from opd_mlx.footprint import activation_bytes
from opd_mlx.forward import CHECKPOINT_ABOVE, complete, hidden_states, look, prefill
from opd_mlx.gradient import Run, add, add_words, memory_name, words_name, words_of
from opd_mlx.kernels.lanes import LANES
from opd_mlx.model import Parameters, load_model, not_finite, read_tensors, write_model, write_tensors
from opd_mlx.objective import HeadResult, default_chunk, divergence_head
from opd_mlx.optimizer import Optimizer, move_teacher, zeros
from opd_mlx.parts import Part, cut, nothing, records

FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors")
"""What `save` writes."""

POLICIES: tuple[Policy, Policy] = ("student", "teacher")


@dataclass(frozen=True)
class Kept:
    """The student's prompts as the rollout ran them, with a backward for the gradient of the same step."""

    prompted: list[rollout.Prompted]
    runs: list[Run]

    def shares(self, groups: Sequence[Group], used: Sequence[int]) -> list[list[int]]:
        """Indices of the `used` of `groups` as the rollout divided them; none where these are not exactly its prompts."""
        places = {id(groups[index].student): index for index in used}
        wanted = [[id(prompt) for prompt in one.prefixes.sources] for one in self.prompted]
        if sorted(chain(*wanted)) != sorted(places) or len(places) != len(used):
            return []
        return [[places[prompt] for prompt in share] for share in wanted]


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
        self._kept: Kept | None = None
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
        """Draws completions; see the protocol. Small prompts that are sampled to learn from wait for their backward."""
        check_ids(prompts, (), self._model.config["text_config"]["vocab_size"])
        self._kept = None
        if policy == "student" and sampling.temperature and uniforms.size:
            self._kept = self._keep(prompts)
        parameters = self._parameters(policy)
        with self._model.bound(parameters):
            head = self._model.head(parameters).astype(mx.float32)
            prompted = rollout.run(self._model, prompts) if self._kept is None else self._kept.prompted
            try:
                return rollout.sample(self._model, head, prompted, uniforms, sampling)
            except FloatingPointError:
                tensor = not_finite(self._model, parameters)
                raise errors.not_finite(self._model.folder, tensor, self._optimizer.step) from None

    def accumulate(self, groups: Sequence[Group], objective: Objective, split: int = 0) -> list[list[TokenStatistics]]:
        """Adds the gradient of the groups' weighted sum; see the protocol.

        The student's prompts run once, and stand still until all parts of completions have asked something of what they keep.
        """
        used = [index for index, group in enumerate(groups) if group.tokens]
        if not used:
            return nothing(groups)
        check_ids((), [groups[index] for index in used], self._model.config["text_config"]["vocab_size"])
        # What there is of a gradient is added to: two would not fit where one does.
        sums, self._gradient = self._gradient, {}
        kept, self._kept = self._kept, None
        shares = kept.shares(groups, used) if kept else []
        prompts = kept.runs if kept and shares else []
        del kept  # before anything runs: it may serve none of these prompts
        shares = shares or [[used[index] for index in share] for share in LANES.shares([groups[index].student for index in used])]
        given = [[groups[index] for index in share] for share in shares]
        parts = [self._part(part) for part in cut(given, split)]
        again = self._again(sum(activation_bytes(self._model, batch) for batch in parts[0].student), sums)
        teacher = self._taught(parts)
        if not prompts:
            look(self._model, [prompt for batch in parts[0].student for prompt in batch.prefixes.sources])
            student = self._cast()
            prompts = LANES.each(parts[0].student, lambda batch: self._prompts(student, batch.prefixes, again))
            del student
            mx.eval([one.outputs for one in prompts])
        statistics: list[list[TokenStatistics]] = [[] for _ in groups]
        words = [words_of(share) for share in given]
        for part, its in zip(parts, teacher, strict=True):
            rows, some = self._completions(part, its, prompts, words, objective, again)
            for index, row in zip(chain(*shares), rows, strict=True):
                statistics[index] += row
            add(sums, some)
        embedding, looked, last = self._model.embedding_name, [], list[Parameters]()
        for number, one in enumerate(prompts):
            slopes = one.start([sums.pop(memory_name(number, place)) for place in range(len(one.outputs))])
            if one.words is not None:
                looked += [(one.words, slopes.pop(embedding)), (mx.array(words[number]), sums.pop(words_name(number)))]
            last.append(slopes)
            del slopes
        add(sums, last)
        if looked:
            add_words(sums, embedding, self._student[embedding].shape, looked)
        self._gradient = sums
        return [its or row for its, row in zip(statistics, nothing(groups), strict=True)]

    def score(self, groups: Sequence[Group], objective: Objective, top: int = 0) -> list[list[TokenStatistics]]:
        """Statistics without a gradient; see the protocol."""
        if not any(group.tokens for group in groups):
            return nothing(groups)
        check_ids((), groups, self._model.config["text_config"]["vocab_size"])
        targets = lay_out_targets(groups)
        teacher, student = self._hidden("teacher", groups), self._hidden("student", groups)
        return records(self._divergence(student, teacher, targets, objective, gradient=False, top=top), targets)

    def apply(self, update: Update) -> UpdateResult:
        """One optimizer step on the gradient summed over all processes; see the protocol."""
        gradient, self._gradient, self._kept = self._gradient or zeros(self._student), {}, None
        if self.size > 1:
            # In one order: what processes add is matched by nothing else.
            gradient = {name: mx.distributed.all_sum(gradient[name], group=self._processes) for name in self._student}
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
                raise FolderError(f"{folder}: no {name}")
        student, teacher = (read_tensors(folder / name, self._model, self._student, [""])[0] for name in FILES[:2])
        moments, metadata = read_tensors(folder / FILES[2], self._model, self._student, ["first.", "second."])
        mx.eval(student, teacher, moments)
        # In place: the optimizer holds the same dictionary.
        self._student.update(student[""])
        self._teacher.update(teacher[""])
        self._optimizer.first, self._optimizer.second = moments["first."], moments["second."]
        self._optimizer.step = int(metadata["step"])
        self._gradient, self._kept = {}, None

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
        prompts = [group.student if policy == "student" else group.teacher for group in groups]
        return lay_out(prompts, [[completion.tokens for completion in group.completions] for group in groups])

    def _part(self, shares: list[list[Group]]) -> Part:
        student, teacher = ([self._batch(policy, share) for share in shares] for policy in POLICIES)
        return Part(shares, student, teacher)

    def _hidden(self, policy: Policy, groups: Sequence[Group]) -> mx.array:
        """Hidden states [M, D] of one policy, without a gradient."""
        with self._model.bound(self._parameters(policy)):
            hidden = hidden_states(self._model, self._batch(policy, [group for group in groups if group.tokens]))
            mx.eval(hidden)
        return hidden

    def _traced(self, completions: bool = False) -> list[str]:
        """Names of the trained parameters that prompts run through, or that `completions` do: all but the vision tower's. A head and an
        embedding go their own ways.
        """
        vision = self._model.family.vision
        names = [name for name in self._student if name not in (self._model.head_name, self._model.embedding_name)]
        return [name for name in names if not name.startswith(vision)] if completions else names

    def _taught(self, parts: Sequence[Part]) -> list[list[mx.array]]:
        """The teacher's hidden states [M, D] of each part's shares; before the student runs, so that one policy's casts and keys are freed
        before the other's."""
        prompts, found = parts[0].teacher, []
        with self._model.bound(self._teacher):
            look(self._model, [prompt for batch in prompts for prompt in batch.prefixes.sources])
            memories = LANES.each(prompts, lambda batch: prefill(self._model, batch.prefixes))
            mx.eval(memories)
            for part in parts:
                batches = [(part.teacher[number], memories[number]) for number in part.filled]
                found.append(LANES.each(batches, lambda one: complete(self._model, *one)))
                mx.eval(found[-1])
        return found

    def _keep(self, prompts: Sequence[Prompt]) -> Kept | None:
        """The prompts as a rollout runs them, for their backward; None where that is not small, or holds casts of all weights."""
        if self._model.dtype != mx.float32 or sum(map(len, prompts)) > rollout.PREFILL_TOKENS:
            return None
        shares = LANES.shares(prompts)
        batches = [lay_out([prompts[index] for index in share], [[] for _ in share]) for share in shares]
        if sum(activation_bytes(self._model, batch) for batch in batches) > CHECKPOINT_ABOVE:
            return None
        with self._model.bound(self._student):
            look(self._model, prompts)
        runs = LANES.each(batches, lambda batch: self._prompts(self._student, batch.prefixes, 0))
        mx.eval([one.outputs for one in runs])
        memories = [list(zip(one.outputs[::2], one.outputs[1::2], strict=True)) for one in runs]
        found = [rollout.Prompted(share, one.prefixes, memory) for share, one, memory in zip(shares, batches, memories, strict=True)]
        return Kept(found, runs)

    def _again(self, wanted: int, sums: Parameters) -> float:
        """The share of layers to compute again in a backward that would hold `wanted` bytes of activations; `sums`: what there is of the
        gradient."""
        if wanted <= CHECKPOINT_ABOVE:
            return 0.0
        return max(0.0, 1 - max(0, self._spare(sums)) / wanted) if mx.default_device() == mx.gpu else 1.0

    def _spare(self, sums: Parameters) -> int:
        """Bytes of the GPU that nothing will need before the gradient is there; a third is left for what no formula knows."""
        free = int(mx.device_info().get("max_recommended_working_set_size", 0)) - mx.get_active_memory()
        gradient = sum(value.nbytes for name, value in self._student.items() if name not in sums)
        casts = sum(value.size for value in self._student.values()) * self._model.dtype.size if self._model.dtype != mx.float32 else 0
        return int(2 / 3 * (free - gradient - casts))

    def _cast(self) -> Parameters:
        """The student's parameters with those of its layers in the type of computation, once for prompts and completions."""
        return {**self._student, **{name: self._student[name].astype(self._model.dtype) for name in self._traced()}}

    def _prompts(self, student: Parameters, prefixes: Prefixes, again: float) -> Run:
        """The student's prompts: what they keep, layer by layer."""

        def run(tokens: mx.array) -> list[mx.array]:
            return list(chain(*prefill(self._model, replace(prefixes, tokens=tokens), again)))

        return Run(self._model, student, self._traced(), prefixes.tokens, run)

    def _rows(self, student: Parameters, batch: Batch, memory: Parameters, words: NDArray[np.int32], again: float) -> Run:
        """The student's completions over what the prompts keep: hidden states [M, D]. `words`: see `words_of`."""

        def run(tokens: mx.array, *kept: mx.array) -> list[mx.array]:
            layers = list(zip(kept[::2], kept[1::2], strict=True))
            return [complete(self._model, replace(batch, tokens=tokens), layers, again).astype(mx.float32)]

        return Run(self._model, student, self._traced(completions=True), batch.tokens, run, memory, words)

    def _completions(
        self,
        part: Part,
        teacher: list[mx.array],
        prompts: list[Run],
        words: list[NDArray[np.int32]],
        objective: Objective,
        again: float,
    ) -> tuple[list[list[TokenStatistics]], list[Parameters]]:
        """Statistics of a part by group, and slopes, not evaluated yet: to parameters, to what the prompts keep and to rows of `words`."""
        groups = list(chain(*part.groups))
        shares = part.filled
        if not shares:
            return nothing(groups), []

        def rows_of(number: int) -> Run:
            memory = {memory_name(number, place): value for place, value in enumerate(prompts[number].outputs)}
            return self._rows(prompts[number].parameters, part.student[number], memory, words[number], again)

        rows = LANES.each(shares, rows_of)
        hidden = [one.outputs[0] for one in rows]
        mx.eval(hidden)
        targets = lay_out_targets(groups)
        result = self._divergence(mx.concatenate(hidden), mx.concatenate(teacher), targets, objective, gradient=True, top=0)
        assert result.hidden_gradient is not None
        gradients = mx.split(result.hidden_gradient, np.cumsum([len(one) for one in hidden])[:-1].tolist())
        slopes: list[Parameters] = []
        for number, one, gradient in zip(shares, rows, gradients, strict=True):
            slopes.append(one.start([gradient]))
            if one.words is not None:
                slopes[-1][words_name(number)] = slopes[-1].pop(self._model.embedding_name)
        if result.head_gradient is not None:
            slopes.append({self._model.head_name: result.head_gradient})
        return records(result, targets), slopes

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
