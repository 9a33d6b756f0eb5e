"""The types that flow between data, method and backends.

Legend: P prompt tokens, T completion tokens, n completions of a prompt, S visual tokens of a
prompt. All arrays are numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from opd.memory import ACTIVATION_BYTES

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int32]
Policy: TypeAlias = Literal["student", "teacher"]

MAX_IMAGE_PIXELS = 178_956_970
"""Default of `data.max_image_pixels`: images with more pixels are refused. Pillow's own limit is
the same."""

IMAGE_MARKER = "<image>"
"""Marks the place of an image in a question, in formats that say it (Vision-OPD-6K, ms-swift,
LLaVA)."""

MAX_PIXELS = 1 << 24
"""Pixels up to which a crop may be enlarged if the encoder does not say its own bound: the largest
bound of a published image processor, 16.8 million."""


@dataclass(frozen=True)
class Picture(ABC):
    """An encoded picture that is not a file of its own: in a row, in an archive, or at a URL.

    It holds the place of the picture and never the content. `name`: the place in words, for
    messages and for the store of sizes, such as "rows.parquet:17 image" or "images.zip/a/b.png";
    different pictures of one data file have different names. `files` hold the content: while they
    do not change, neither does the picture. Pictures with equal names and files are equal.
    """

    name: str
    files: tuple[Path, ...]

    @abstractmethod
    def read(self) -> bytes:
        """The content of the encoded picture. Safe for threads. Raises DataError, whose message
        names the picture."""


EncodedImage: TypeAlias = Path | Picture
ImageSource: TypeAlias = EncodedImage | Image


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

    Evidence is either `boxes`, from which the teacher's crop is cut, or `teacher_images`, which the
    teacher sees as they are.
    `answer`: one reference answer, or several, of which any is correct; measuring reads it,
    training does not. `choices` are added to the prompt if the question does not list them
    (`opd.views.questions`).
    `max_image_pixels`: images with more pixels are refused when they are opened.
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
    """The visual tokens of a prompt: the place of each in the prompt, and the part of an image that
    it covers.

    `index` [S]: position in the prompt's tokens. `image` [S]: index of the image. `boxes` [S, 4]:
    left, top, right, bottom in pixels of the image that the encoder was given.
    """

    index: IntArray
    image: IntArray
    boxes: FloatArray


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt, ready for any backend.

    `tokens` [P]; `positions` [axes, P], the rotary positions (3 axes for mRoPE families);
    completion token t has the position `start + t` on every axis. `images` holds the arguments of
    the model's forward by name (`pixel_values`, `image_grid_thw`). `key` is a hash of image content
    and processor settings: equal keys mean equal vision features.
    Prompts of one question share arrays, so the arrays are read-only.
    """

    tokens: IntArray
    positions: IntArray
    images: Mapping[str, NDArray[np.generic]]
    key: str
    visual: VisualTokens

    @property
    def start(self) -> int:
        """Position of the first completion token: the largest prompt position + 1. It is less than
        P where an image takes fewer positions than tokens."""
        return int(self.positions.max()) + 1

    def row_positions(self, length: int) -> IntArray:
        """Rotary positions [axes, length] of the rows that predict a completion's tokens: the last
        prompt token, then all but the last completion token."""
        positions = np.empty((len(self.positions), length), np.int32)
        positions[:, :1] = self.positions[:, -1:]
        positions[:, 1:] = np.arange(self.start, self.start + length - 1)
        return positions

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Completion:
    """A sampled completion: `tokens` [T] and `logprobs` [T]; `finished` if the last token is an
    end-of-turn token.

    `logprobs` are natural logarithms under the distribution that each token was drawn from,
    including temperature and banned tokens; at temperature 0 (greedy) those of temperature 1.
    """

    tokens: IntArray
    logprobs: FloatArray
    finished: bool

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Group:
    """The unit of work: one student prompt, one teacher prompt, and n completions, which both
    policies score.

    `weights` holds one float32 [T] array per completion. The step's loss is the plain sum of weight
    * ratio * divergence over all groups: weights are already normalised, and weight 0 removes a
    token.
    """

    student: Prompt
    teacher: Prompt
    completions: tuple[Completion, ...]
    weights: tuple[FloatArray, ...]

    @property
    def tokens(self) -> int:
        """Number of completion tokens in the group."""
        return sum(len(completion) for completion in self.completions)


@dataclass(frozen=True)
class Alternatives:
    """The most likely next tokens of one policy at each position: `tokens` and `logprobs` (nats),
    both [T, top], most likely first."""

    tokens: IntArray
    logprobs: FloatArray


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each token of one completion; every array is float32 [T], in nats (`ratio` has
    no unit).

    Log-probabilities and entropies belong to the tempered distributions over the full vocabulary.
    `divergence` is the objective's value before the weight and the importance ratio.
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
    """How tokens are drawn: `temperature` >= 0 (0 is greedy), `stop` ids that end a completion,
    `banned` ids that are never drawn."""

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
    """The result of one optimizer step: `gradient_norm` before clipping; `taken` is False if the
    norm was not finite, and then the step changed nothing."""

    gradient_norm: float
    taken: bool


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters, and the linear layers that get one.

    `rank` >= 1. `alpha`: the product B A is multiplied by alpha / rank. `targets`: last words of
    the names of the language model's layers; empty: every linear layer. `vision`, `projector`: also
    every linear layer of that part. `seed` draws the initial values.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()
    vision: bool = False
    projector: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelOptions:
    """How a backend loads a model. `path` is a folder in Hugging Face layout.

    With `adapters`, only adapters are trained and the model's weights are frozen, in 4 bits if
    `four_bit`. Without, all parameters are trained, those of the vision tower only if
    `tune_vision`. `adapter` is a folder in PEFT's format (`opd.models.adapters`): with `adapters`
    training starts from it, without it is merged into the weights. `checkpoint_above`: bytes of
    activations that a backward may hold without recomputing any layer.
    """

    path: Path
    dtype: str = "float32"
    tune_vision: bool = True
    adapters: AdapterOptions | None = None
    adapter: Path | None = None
    four_bit: bool = False
    checkpoint_above: int = ACTIVATION_BYTES

    @property
    def item(self) -> int:
        """Bytes of a number in computation."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def tunes_features(self) -> bool:
        """Whether training changes image features, so that they have a backward and are not kept
        from step to step."""
        adapters = self.adapters
        return self.tune_vision if adapters is None else adapters.vision or adapters.projector


class Encoder(Protocol):
    """Turns images and a question into a Prompt, and token ids back into text. Training uses
    `opd.prompts.encoder.PromptEncoder`."""

    @property
    def stop(self) -> tuple[int, ...]:
        """Token ids that end a completion."""

    @property
    def banned(self) -> tuple[int, ...]:
        """Token ids that never appear in a completion."""

    def encode(self, images: Sequence[Image], question: str, policy: Policy = "student") -> Prompt:
        """The prompt of one user turn, up to where the model's answer begins. Images may be resized
        to other bounds for the teacher than for the student."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a completion, without special tokens."""

    def save(self, folder: Path) -> None:
        """Writes tokenizer, chat template and image processor into the folder of an exported model,
        so that other programs build the prompt that was trained."""


@runtime_checkable
class SizedEncoder(Encoder, Protocol):
    """An encoder that computes the length of a prompt from image sizes, without decoding images."""

    def length(
        self, sizes: Sequence[tuple[int, int]], question: str, policy: Policy = "student"
    ) -> int:
        """Number of tokens in the prompt of `question` with images of `sizes` (width, height) in
        pixels."""

    def max_pixels(self, policy: Policy) -> int:
        """Largest number of pixels of an image of this policy; larger images are scaled down."""
