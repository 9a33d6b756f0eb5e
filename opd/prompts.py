"""Prompts: images and a question become tokens, positions and arrays, once, for every backend.

Only a tokenizer and a PIL image processor are loaded (no torch, no torchvision): the arrays are numpy and feed any backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from opd import families, inert, templates
from opd.errors import DataError, ModelError
from opd.families.layout import Layout, Tile
from opd.model_files import check_links, read_json
from opd.types import IntArray, Policy, Prompt, VisualTokens

IMAGE_MARKER = "<image>"
"""Where an image stands in a question, in the formats that say so (Vision-OPD-6K, ms-swift, LLaVA)."""

NEEDED = (
    ("config.json",),
    ("tokenizer_config.json",),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)
"""Files of a model folder without which no prompt can be encoded, with the names that each may have."""

TEXTS = 4096
"""Rendered questions, and tokenized texts, that are kept."""

LAYOUTS = 256
"""Prompts whose tokens and positions are kept, and images whose visual tokens' boxes are: a few hundred kilobytes each at most."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a model folder that make its tokenizer and chat template."""


class PromptEncoder:
    """Encodes prompts as the model's own processor does. `stop`: ids that end a completion; `banned`: ids that never appear in one."""

    stop: tuple[int, ...]
    banned: tuple[int, ...]

    def __init__(
        self,
        model: Path,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        teacher_max_pixels: int | None = None,
        teacher_min_pixels: int | None = None,
    ) -> None:
        """Loads tokenizer, chat template and image processor from a folder in Hugging Face layout; nothing is downloaded.

        `max_pixels`, `min_pixels`: bounds on an image's width * height after resizing; None leaves the model's own. The teacher's
        follow the student's where they are None.
        Raises ModelError with one line that says what is missing.
        """
        model = Path(model)
        self._config = read_config(model)
        self._family = families.family(str(self._config.get("model_type")))
        self._model = model
        self._tokenizer, self._processor = _load(model)
        self._tokenizer.chat_template = templates.every(self._tokenizer.chat_template, self._probe)
        teacher = teacher_min_pixels or min_pixels, teacher_max_pixels or max_pixels
        self._sizes = {
            "student": self._family.sizes(self._processor, min_pixels, max_pixels),
            "teacher": self._family.sizes(self._processor, *teacher),
        }
        # Student and teacher are asked the same, and so are all epochs.
        self._asked = lru_cache(TEXTS)(lambda question, images: self._render(content(question, images)))
        self._ids = lru_cache(TEXTS)(self._tokenized)
        self._placed = lru_cache(LAYOUTS)(self._place)
        self._image_token = self._token(model, self._family.image_token)
        self.banned = tuple(self._token(model, token) for token in self._family.banned)
        self.stop = self._stops(model)
        self._settings = {
            policy: json.dumps({**self._processor.to_dict(), **sizes}, sort_keys=True, default=str).encode()
            for policy, sizes in self._sizes.items()
        }

    def encode(self, images: Sequence[Image], question: str, policy: Policy = "student") -> Prompt:
        """One user turn, thinking off: the images, then the question; or the images where `<image>` stands in the question.

        `images` are upright and RGB (see `opd.view`). With more images than markers, the rest follow the last marked one.
        Raises DataError where the question and the images do not fit together, or an image is too narrow to encode.
        """
        text = self._asked(question, len(images))
        arrays, layouts = self._lay_out(images, self._sizes[policy])
        before, *parts = text.split(self._family.placeholder)
        if len(parts) != len(images):
            raise DataError(f"the question {question[:80]!r} contains a reserved token such as '{self._family.placeholder}'; remove it")
        text = before + "".join(layout.text + part for layout, part in zip(layouts, parts, strict=True))
        if np.count_nonzero(self._ids(text) == self._image_token) != sum(len(layout.tiles) for layout in layouts):
            raise DataError(f"the question {question[:80]!r} contains a reserved token such as '{self._family.image_token}'; remove it")
        tiles = tuple((number, tile) for number, layout in enumerate(layouts) for tile in layout.tiles)
        tokens, positions, visual = self._placed(text, tiles, tuple(image.size for image in images))
        return Prompt(tokens, positions, arrays, self._key(images, self._settings[policy]), visual)

    def max_pixels(self, policy: Policy) -> int:
        """The width * height to which larger images are brought: no crop is worth enlarging above it."""
        return self._family.most_pixels(self._processor, self._sizes[policy])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a completion, without special tokens."""
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """Writes tokenizer and chat template into an exported folder: its template alone, without an argument, gives these prompts."""
        missing = [name for name in TOKENIZER if not (folder / name).exists()]  # an adapter is exported without
        inert.copy_files(self._model, folder, missing)
        templates.rewrite(folder, self._probe)

    def _tokenized(self, text: str) -> IntArray:
        ids = np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        ids.flags.writeable = False
        return ids

    def _place(
        self, text: str, tiles: tuple[tuple[int, Tile], ...], sizes: tuple[tuple[int, int], ...]
    ) -> tuple[IntArray, IntArray, VisualTokens]:
        """Tokens, positions and visual tokens of a text in which each of `tiles`, with the number of its image, has one image token.

        A long text of nothing but image tokens would cost more than the images.
        """
        compact = self._ids(text)
        copies = np.ones(len(compact), dtype=np.int64)
        copies[compact == self._image_token] = [tile.tokens for _, tile in tiles]
        tokens = np.repeat(compact, copies)
        visual = VisualTokens(
            index=np.flatnonzero(tokens == self._image_token).astype(np.int32),
            image=np.repeat(np.array([image for image, _ in tiles], dtype=np.int32), [tile.tokens for _, tile in tiles]),
            boxes=np.concatenate([np.zeros((0, 4), dtype=np.float32), *(tile.boxes(*sizes[image]) for image, tile in tiles)]),
        )
        positions = self._family.positions(tokens, self._image_token, [tile.grid for _, tile in tiles])
        for array in (tokens, positions, visual.index, visual.image, visual.boxes):  # prompts share them
            array.flags.writeable = False
        return tokens, positions, visual

    def _render(self, content: list[dict[str, str]], template: str | None = None) -> str:
        turn = [{"role": "user", "content": content}]
        return str(self._tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True))

    def _probe(self, template: str) -> str:
        """The generation prompt of a template. Raises ModelError where it cannot be rendered."""
        try:
            return self._render([{"type": "text", "text": "?"}], template)
        except Exception as error:  # whatever a template does
            raise ModelError(f"{self._model}: the chat template cannot be rendered: {one_line(error)}") from error

    def _lay_out(self, images: Sequence[Image], sizes: dict[str, Any]) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        if not images:
            return {}, []
        try:
            return self._family.lay_out(self._processor, images, sizes, self._config)
        except ValueError as error:
            given = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise DataError(f"images of {given} pixels cannot be encoded: {one_line(error)}") from error

    def _key(self, images: Sequence[Image], settings: bytes) -> str:
        digest = hashlib.sha256(settings)
        for image in images:
            digest.update(f"{image.mode} {image.width} {image.height};".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()

    def _token(self, model: Path, token: str) -> int:
        number = self._tokenizer.get_vocab().get(token)
        if number is None:
            raise ModelError(f"{model}: the tokenizer has no token '{token}', which {self._config['model_type']} needs")
        return int(number)

    def _stops(self, model: Path) -> tuple[int, ...]:
        path = model / "generation_config.json"
        named = read_json(path).get("eos_token_id") if path.is_file() else None
        found = [*(named if isinstance(named, list) else [named]), self._tokenizer.eos_token_id]
        stops = tuple(dict.fromkeys(int(token) for token in found if token is not None))
        if not stops:
            raise ModelError(f"{model}: neither generation_config.json nor the tokenizer names an end-of-turn token")
        return stops


def content(question: str, images: int) -> list[dict[str, str]]:
    """The parts of the user's turn: images and the texts between them."""
    first, *rest = question.split(IMAGE_MARKER)
    if not rest:
        return [{"type": "image"}] * images + [{"type": "text", "text": question}]
    if len(rest) > images:
        raise DataError(f"the question has {len(rest)} '{IMAGE_MARKER}' markers for {images} images: {question[:80]!r}")
    parts = [{"type": "text", "text": first}]
    for number, text in enumerate(rest, start=1):
        standing = 1 + (images - len(rest) if number == len(rest) else 0)
        parts += [{"type": "image"}] * standing + [{"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a complete model folder. Raises ModelError."""
    if not model.is_dir():
        raise ModelError(f"model folder not found: {model}")
    for names in NEEDED:
        if not any((model / name).is_file() for name in names):
            raise ModelError(f"{model} is not a complete model folder: {' or '.join(names)} is missing")
    check_links(model)
    config = read_json(model / "config.json")
    if not config.get("model_type"):
        raise ModelError(f"{model / 'config.json'} has no model_type")
    return config


def _load(model: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(model, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError and bare Exception for broken files
        raise ModelError(f"{model}: tokenizer or image processor cannot be loaded: {one_line(error)}") from error
    older = model / "chat_template.json"  # where processors kept it before transformers 4.50
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = read_json(older).get("chat_template")
    if not tokenizer.chat_template:
        raise ModelError(
            f"{model}: the tokenizer has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json or "
            "chat_template.json)"
        )
    return tokenizer, processor


def one_line(error: Exception) -> str:
    """An error of other people's code in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
