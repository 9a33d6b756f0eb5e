"""The types that flow between data, method and backends.

Legend: P prompt tokens, T completion tokens, n completions of a prompt, S visual tokens of a
prompt. All arrays are numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int32]
ImageSource: TypeAlias = Path | Image
Policy: TypeAlias = Literal["student", "teacher"]

MAX_IMAGE_PIXELS = 178_956_970
"""Default of `data.max_image_pixels`: pictures of more pixels are refused, as Pillow refuses them
by itself."""


IMAGE_MARKER = "<image>"
"""Where an image stands in a question, in the formats that say so (Vision-OPD-6K, ms-swift,
LLaVA)."""

MAX_PIXELS = 1 << 24
"""Pixels above which no crop is enlarged where nothing is known of the image processor: the largest
published bound, 16.8 million."""


@dataclass(frozen=True)
class Box:
    """An evidence box in pixels of one image: left, top, right, bottom; right and bottom are
    exclusive."""

    x0: float
    y0: float
    x1: float
    y1: float
    image: int = 0


@dataclass(frozen=True)
class Example:
    """One row of data: what the student sees, and where the evidence is.

    Evidence is either `boxes`, from which the teacher's crop is cut, or `teacher_images`, given as
    they are.
    `answer` serves measuring only; training never reads it: one reference answer, or several of
    which any is right. `choices` are put into the prompt where the question does not hold them
    (`opd.views.questions`).
    `max_image_pixels`: larger pictures are refused when they are opened.
    """

    id: str
    images: tuple[ImageSource, ...]
    question: str
    boxes: tuple[Box, ...] = ()
    teacher_images: tuple[ImageSource, ...] = ()
    teacher_question: str | None = None
    answer: str | tuple[str, ...] | None = None
    choices: tuple[str, ...] = ()
    weight: float = 1.0
    source: str = ""
    max_image_pixels: int = MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class VisualTokens:
    """Where a prompt's visual tokens stand and what they look at.

    `index` [S]: position in the prompt's tokens. `image` [S]: which image. `boxes` [S, 4]: left,
    top, right, bottom in pixels of that image as it was given to the encoder.
    """

    index: IntArray
    image: IntArray
    boxes: FloatArray


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt, ready for any backend.

    `tokens` [P]; `positions` [axes, P], the rotary positions (3 axes for mRoPE families);
    completion token t stands at `start + t` on every axis. `images` holds the model's own forward
    arguments by name (`pixel_values`, `image_grid_thw`). `key` is a hash of image content and
    processor settings: equal keys mean equal vision features.
    Prompts of one question share arrays, which are read-only.
    """

    tokens: IntArray
    positions: IntArray
    images: Mapping[str, NDArray[np.generic]]
    key: str
    visual: VisualTokens

    @property
    def start(self) -> int:
        """Position of the first completion token: largest prompt position + 1, which is not P where
        images compress positions."""
        return int(self.positions.max()) + 1

    def row_positions(self, length: int) -> IntArray:
        """Rotary positions [axes, length] of a completion's rows: the last prompt token's, then
        those of the completion's tokens."""
        positions = np.empty((len(self.positions), length), np.int32)
        positions[:, :1] = self.positions[:, -1:]
        positions[:, 1:] = np.arange(self.start, self.start + length - 1)
        return positions

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Completion:
    """A sampled completion: `tokens` [T] with the end-of-turn token if it was reached (`finished`),
    and `logprobs` [T].

    `logprobs` are natural logarithms under the very distribution each token was drawn from,
    temperature and banned tokens included; at temperature 0 (greedy) they are of temperature 1.
    """

    tokens: IntArray
    logprobs: FloatArray
    finished: bool

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Group:
    """The unit of work: one student prompt, one teacher prompt, and the n completions that both are
    read along.

    `weights` holds one float32 [T] array per completion; the step's loss is the plain sum of weight
    * ratio * divergence over all groups, so weights are normalised before they get here, and 0
    removes a token.
    """

    student: Prompt
    teacher: Prompt
    completions: tuple[Completion, ...]
    weights: tuple[FloatArray, ...]

    @property
    def tokens(self) -> int:
        """Completion tokens of the group."""
        return sum(len(completion) for completion in self.completions)


@dataclass(frozen=True)
class Alternatives:
    """The most likely next tokens of one policy at each position: `tokens` and `logprobs`, both [T,
    top], best first."""

    tokens: IntArray
    logprobs: FloatArray


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of each token of one completion; every array is float32 [T], in nats.

    Log-probabilities and entropies are of the tempered distributions over the full vocabulary.
    `divergence` is the objective's value before weight and importance ratio.
    """

    student_logprobs: FloatArray
    teacher_logprobs: FloatArray
    student_entropy: FloatArray
    teacher_entropy: FloatArray
    ratio: FloatArray
    divergence: FloatArray
    student_top: Alternatives | None = None
    teacher_top: Alternatives | None = None


STATISTICS = tuple(field.name for field in fields(TokenStatistics) if field.default is MISSING)
"""Names of the six arrays of `TokenStatistics`, in order."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` (0 is greedy), `stop` ids that end a completion, `banned`
    ids that never appear."""

    temperature: float = 1.0
    stop: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Update:
    """One AdamW step with bias correction: decoupled weight decay on every trained parameter,
    clipping by global norm."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float | None = 1.0


@dataclass(frozen=True)
class UpdateResult:
    """`gradient_norm` before clipping; `taken` is False where it was not finite and nothing was
    changed."""

    gradient_norm: float
    taken: bool


@dataclass(frozen=True)
class AdapterOptions:
    """Adapters of `rank` on the language model's linear layers, on every one or on `targets` (by
    the last word of a name); and on every linear layer of vision tower and projector where those
    are asked for."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()
    vision: bool = False
    projector: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelOptions:
    """How a backend loads a model: `path` is a folder in Hugging Face layout.

    With `adapters` only those are trained, over the model's frozen weights, which stand in 4 bits
    where `four_bit`; without, all parameters are, the vision tower's where `tune_vision`. `adapter`
    is a folder in PEFT's format: what the adapters start from, or what is added to the weights
    where there are none. See `opd.models.adapters`.
    """

    path: Path
    dtype: str = "float32"
    tune_vision: bool = True
    adapters: AdapterOptions | None = None
    adapter: Path | None = None
    four_bit: bool = False


class Encoder(Protocol):
    """Turns images and a question into a Prompt, and tokens back into text;
    `opd.prompts.encoder.PromptEncoder` is the real one."""

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a completion."""

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that never appear in a completion."""

    def encode(self, images: Sequence[Image], question: str, policy: Policy = "student") -> Prompt:
        """One user turn, ready for the model's answer; the two policies may look at images of
        different sizes."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a completion, without special tokens."""

    def save(self, folder: Path) -> None:
        """Writes into an exported folder what turns a conversation into the prompt that was
        trained."""


@runtime_checkable
class SizedEncoder(Encoder, Protocol):
    """An encoder that tells the length of a prompt from the sizes of its images, so that none is
    decoded."""

    def length(
        self, sizes: Sequence[tuple[int, int]], question: str, policy: Policy = "student"
    ) -> int:
        """Tokens of the prompt of a question with images of `sizes` (width, height)."""

    def max_pixels(self, policy: Policy) -> int:
        """Pixels above which an image of this policy is made smaller."""
