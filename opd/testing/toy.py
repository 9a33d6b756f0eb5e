"""The backend protocol by example: a language model small enough to read, in numpy, with the
reference objective.

The next token's logits are `tokens[previous token] + image features @ vision`, where the image
features are the mean of all pixels' patches. It learns, it is exact in float64, and a step takes
milliseconds, so the loop's own tests run on it. `Together` runs several of them as the processes of
one run, on threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from opd.backend import Prefill
from opd.groups import rows_to_attend
from opd.objective import Evaluation, Float64, Objective, evaluate, log_softmax
from opd.types import (
    Alternatives,
    Completion,
    FloatArray,
    Group,
    Policy,
    Prompt,
    Sampling,
    TokenStatistics,
    Update,
    UpdateResult,
    VisualTokens,
)

VOCABULARY = 16
FEATURES = 3
STOP, IMAGE = 0, 1

SAMPLE, ACCUMULATE = np.zeros(101), np.zeros(102)
"""Arrays that processes exchange in `sample` and `accumulate`; no other exchange has these
shapes."""

Parameters = dict[str, Float64]


class ToyEncoder:
    """Encodes like `opd.prompts.encoder.PromptEncoder`: one image token, then a token for each
    letter of the question."""

    stop = (STOP,)
    banned = (IMAGE,)

    def encode(self, images: Sequence[Image], question: str, policy: Policy = "student") -> Prompt:
        """A prompt with a visual token for each image and a token for each letter. `pixel_values`
        holds the mean colour of each image, in 0..1."""
        letters = [2 + ord(letter) % (VOCABULARY - 2) for letter in question]
        tokens = np.array([IMAGE] * len(images) + letters, np.int32)
        colours = np.array(
            [np.asarray(image, np.float32).reshape(-1, FEATURES).mean(0) / 255 for image in images],
            np.float32,
        )
        place = np.arange(len(images), dtype=np.int32)
        boxes = np.array([[0, 0, *image.size] for image in images], np.float32)
        key = hashlib.sha256(colours.tobytes()).hexdigest()
        return Prompt(
            tokens,
            np.arange(len(tokens), dtype=np.int32)[None],
            {"pixel_values": colours},
            key,
            VisualTokens(place, place, boxes),
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens as letters, without the stop token."""
        return "".join(chr(ord("a") + token) for token in tokens if token != STOP)

    def save(self, folder: Path) -> None:
        """A toy has no tokenizer."""


class ToyBackend:
    """A backend of one process, in float64."""

    rank, size = 0, 1
    attends = True
    device = "numpy"
    peak_memory = 0

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.student: Parameters = {
            "tokens": rng.normal(size=(VOCABULARY, VOCABULARY)),
            "vision": 4 * rng.normal(size=(FEATURES, VOCABULARY)),
        }
        self.teacher = {name: value.copy() for name, value in self.student.items()}
        self.gradient = self._zeros()
        self._weights = object()
        self.first, self.second, self.steps = self._zeros(), self._zeros(), 0

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values themselves, since there is one process."""
        return values

    def prefill(self, prompts: Sequence[Prompt]) -> Prefill | None:
        """The features of the prompts, which completions read."""
        return Prefill(prompts, [_features(prompt) for prompt in prompts], self._weights)

    def sample(
        self,
        prompts: Sequence[Prompt],
        uniforms: FloatArray,
        sampling: Sampling,
        policy: Policy = "student",
        prefill: Prefill | None = None,
    ) -> list[list[Completion]]:
        """Draws completions of each prompt, row by row, in float64."""
        if prefill:
            prefill.read(prompts, self._weights)
        parameters = self.student if policy == "student" else self.teacher
        return [
            [self._completion(parameters, prompt, row, sampling) for row in rows]
            for prompt, rows in zip(prompts, uniforms, strict=True)
        ]

    def accumulate(
        self,
        groups: Sequence[Group],
        objective: Objective,
        split: int = 0,
        prefill: Prefill | None = None,
    ) -> list[list[TokenStatistics]]:
        """Adds the gradient of `opd.objective`. A toy needs so little memory that it ignores
        `split`."""
        if prefill:
            prefill.take([group.student for group in groups], self._weights)
        evaluations = self._evaluate(groups, objective)
        for group, row in zip(groups, evaluations, strict=True):
            for completion, weights, evaluation in zip(
                group.completions, group.weights, row, strict=True
            ):
                outer = weights[:, None] * evaluation.gradient
                np.add.at(self.gradient["tokens"], _previous(group.student, completion), outer)
                self.gradient["vision"] += np.outer(_features(group.student), outer.sum(0))
        return [[_statistics(evaluation) for evaluation in row] for row in evaluations]

    def score(
        self, groups: Sequence[Group], objective: Objective, top: int = 0
    ) -> list[list[TokenStatistics]]:
        """The statistics; with `top`, also the most likely ids of both policies."""
        evaluations = self._evaluate(groups, objective)
        if not top:
            return [[_statistics(evaluation) for evaluation in row] for row in evaluations]
        return [
            [
                _statistics(
                    evaluation,
                    self._alternatives(
                        self.student, group.student, completion, objective.temperature, top
                    ),
                    self._alternatives(
                        self.teacher, group.teacher, completion, objective.temperature, top
                    ),
                )
                for completion, evaluation in zip(group.completions, row, strict=True)
            ]
            for group, row in zip(groups, evaluations, strict=True)
        ]

    def attend(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        policy: Policy = "student",
    ) -> list[list[FloatArray]]:
        """One layer, whose rows attend to all visual tokens alike: logits depend on the mean of
        their features."""
        return [
            [
                np.full(
                    (1, len(tokens), len(prompt.visual.index)), 1 / len(prompt.visual.index)
                ).astype(np.float32)
                for tokens in members
            ]
            for prompt, members in zip(prompts, rows_to_attend(completions), strict=True)
        ]

    def apply(self, update: Update) -> UpdateResult:
        """One AdamW step in float64 on the sum over all processes."""
        gradient, self.gradient = self._gathered(), self._zeros()
        self._weights = object()
        norm = float(np.sqrt(sum((value**2).sum() for value in gradient.values())))
        if not np.isfinite(norm):
            return UpdateResult(norm, taken=False)
        scale = (
            1.0
            if update.gradient_clip is None or norm == 0
            else min(1.0, update.gradient_clip / norm)
        )
        self.steps += 1
        b1, b2 = update.betas
        for name, value in self.student.items():
            g = scale * gradient[name]
            self.first[name] += (1 - b1) * (g - self.first[name])
            self.second[name] += (1 - b2) * (g**2 - self.second[name])
            step = (
                self.first[name]
                / (1 - b1**self.steps)
                / (np.sqrt(self.second[name] / (1 - b2**self.steps)) + update.epsilon)
            )
            value -= update.learning_rate * (step + update.weight_decay * value)
        return UpdateResult(norm, taken=True)

    def move_teacher(self, rate: float) -> None:
        """Moves the teacher's tables towards the student's."""
        for name, value in self.teacher.items():
            value += rate * (self.student[name] - value)

    def save(self, folder: Path) -> None:
        """Writes `toy.npz`."""
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {
            "student": self.student,
            "teacher": self.teacher,
            "first": self.first,
            "second": self.second,
        }
        arrays: dict[str, Any] = {
            f"{kind}.{name}": value
            for kind, values in kinds.items()
            for name, value in values.items()
        }
        np.savez(folder / "toy.npz", **arrays, steps=np.array(self.steps))

    def load(self, folder: Path) -> None:
        """Reads `toy.npz`."""
        with np.load(folder / "toy.npz") as stored:
            for kind in ("student", "teacher", "first", "second"):
                setattr(self, kind, {name: stored[f"{kind}.{name}"] for name in self.student})
            self.steps = int(stored["steps"])
        self.gradient, self._weights = self._zeros(), object()

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student's parameters; a toy has no files in Hugging Face layout."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = dict(self.student)
        np.savez(folder / f"{kind}.npz", **arrays)

    def tensors(self, kind: Literal["student", "teacher", "gradient"]) -> dict[str, FloatArray]:
        """Float32 copies of the tables."""
        values = {"student": self.student, "teacher": self.teacher, "gradient": self.gradient}[kind]
        return {name: value.astype(np.float32) for name, value in values.items()}

    def _gathered(self) -> Parameters:
        """The gradient summed over all processes."""
        return {name: self.total(value) for name, value in self.gradient.items()}

    def _zeros(self) -> Parameters:
        return {name: np.zeros_like(value) for name, value in self.student.items()}

    def _completion(
        self, parameters: Parameters, prompt: Prompt, uniforms: FloatArray, sampling: Sampling
    ) -> Completion:
        tokens: list[int] = []
        logprobs: list[float] = []
        last = int(prompt.tokens[-1])
        for uniform in uniforms:
            logits = parameters["tokens"][last] + _features(prompt) @ parameters["vision"]
            logits[list(sampling.banned)] = -np.inf
            s = log_softmax(logits / (sampling.temperature or 1.0))
            if sampling.temperature == 0:
                last = int(s.argmax())
            else:
                cumulative = np.exp(s).cumsum()
                last = min(
                    VOCABULARY - 1,
                    int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")),
                )
            tokens.append(last)
            logprobs.append(float(s[last]))
            if last in sampling.stop:
                break
        return Completion(
            np.array(tokens, np.int32), np.array(logprobs, np.float32), last in sampling.stop
        )

    def _evaluate(self, groups: Sequence[Group], objective: Objective) -> list[list[Evaluation]]:
        return [
            [
                evaluate(
                    _logits(self.student, group.student, completion),
                    _logits(self.teacher, group.teacher, completion),
                    completion.tokens,
                    completion.logprobs,
                    objective,
                )
                for completion in group.completions
            ]
            for group in groups
        ]

    def _alternatives(
        self,
        parameters: Parameters,
        prompt: Prompt,
        completion: Completion,
        temperature: float,
        top: int,
    ) -> Alternatives:
        s = log_softmax(_logits(parameters, prompt, completion) / temperature)
        ids = np.argsort(-s, axis=-1)[:, :top]
        return Alternatives(ids.astype(np.int32), np.take_along_axis(s, ids, -1).astype(np.float32))


class Together(ToyBackend):
    """One of several toy processes, which run on threads and meet at a barrier; `start` runs all.

    The processes also meet in every `sample` and `accumulate`, as processes that share a model's
    layers do: a process that makes one call more or less breaks the run.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        barrier: threading.Barrier,
        board: dict[int, NDArray[np.float64]],
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over the threads, in the order of their ranks."""
        self._board[self.rank] = values
        self._barrier.wait()
        if len({value.shape for value in self._board.values()}) > 1:
            raise RuntimeError(
                "the processes make different calls:"
                f" {sorted((rank, value.shape) for rank, value in self._board.items())}"
            )
        result = np.sum([self._board[rank] for rank in range(self.size)], axis=0)
        self._barrier.wait()
        return np.asarray(result)

    def sample(
        self,
        prompts: Sequence[Prompt],
        uniforms: FloatArray,
        sampling: Sampling,
        policy: Policy = "student",
        prefill: Prefill | None = None,
    ) -> list[list[Completion]]:
        """Samples, together with the other processes."""
        self.total(SAMPLE)
        return super().sample(prompts, uniforms, sampling, policy, prefill)

    def accumulate(
        self,
        groups: Sequence[Group],
        objective: Objective,
        split: int = 0,
        prefill: Prefill | None = None,
    ) -> list[list[TokenStatistics]]:
        """Accumulates, together with the other processes."""
        self.total(ACCUMULATE)
        return super().accumulate(groups, objective, split, prefill)

    @staticmethod
    def start(size: int, run: Callable[[ToyBackend], None]) -> None:
        """Calls `run` with each of `size` processes, on threads, and raises the first error."""
        barrier = threading.Barrier(size, timeout=10)
        board: dict[int, NDArray[np.float64]] = {}
        failures: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                run(Together(rank, size, barrier, board))
            except BaseException as failure:
                # A failed thread must not leave the others at the barrier.
                failures.append(failure)
                barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _features(prompt: Prompt) -> Float64:
    return np.asarray(np.asarray(prompt.images["pixel_values"], np.float64).mean(0))


def _previous(prompt: Prompt, completion: Completion) -> NDArray[np.int32]:
    """The token before each completion token [T]; before the first one stands the last prompt
    token."""
    return np.concatenate([prompt.tokens[-1:], completion.tokens[:-1]])


def _logits(parameters: Parameters, prompt: Prompt, completion: Completion) -> Float64:
    return np.asarray(
        parameters["tokens"][_previous(prompt, completion)]
        + _features(prompt) @ parameters["vision"]
    )


def _statistics(
    evaluation: Evaluation,
    student_top: Alternatives | None = None,
    teacher_top: Alternatives | None = None,
) -> TokenStatistics:
    return TokenStatistics(
        student_logprobs=evaluation.student_logprobs.astype(np.float32),
        teacher_logprobs=evaluation.teacher_logprobs.astype(np.float32),
        student_entropy=evaluation.student_entropy.astype(np.float32),
        teacher_entropy=evaluation.teacher_entropy.astype(np.float32),
        ratio=evaluation.ratio.astype(np.float32),
        divergence=evaluation.divergence.astype(np.float32),
        student_top=student_top,
        teacher_top=teacher_top,
    )
