"""Encodes prompts: turns images and a question into tokens, positions and image arrays.

The arrays are numpy and serve every backend. The encoder loads a tokenizer and a PIL image
processor, neither torch nor torchvision.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opd.errors import DataError, ModelError, one_line, plural
from opd.models import consistency, inert, weight_formats
from opd.models.files import check_links, read_json
from opd.prompts import families, renderer, templates
from opd.prompts.families.layout import Layout, Tile
from opd.types import IMAGE_MARKER, IntArray, Policy, Prompt, VisualTokens

NEEDED = (
    ("config.json",),
    ("tokenizer_config.json",),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)
"""Files of a model folder that encoding needs; each entry lists the names that the file may
have."""

TEXTS = 4096
"""Entries in the caches of rendered questions and of tokenized texts."""

LAYOUTS = 256
"""Entries in the cache of tokens, positions and visual tokens; an entry takes at most a few hundred
kilobytes."""

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
"""Files of a model folder that define tokenizer and chat template."""


class PromptEncoder:
    """Encodes prompts as the model's own processor does. `stop`: token ids that end a completion;
    `banned`: token ids that never appear in a completion."""

    stop: tuple[int, ...]
    banned: tuple[int, ...]
    _rows: int | None = None
    """Number of rows of the embedding; `check` sets it."""

    def __init__(
        self,
        model: Path,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        teacher_max_pixels: int | None = None,
        teacher_min_pixels: int | None = None,
    ) -> None:
        """Loads tokenizer, chat template and image processor from a folder in Hugging Face layout;
        downloads nothing.

        `max_pixels`, `min_pixels`: bounds on an image's width * height after resizing; None keeps
        the model's own bound. `teacher_max_pixels`, `teacher_min_pixels`: the same for the teacher;
        None takes the student's bound.
        Raises ModelError, of one line that says what is missing.
        """
        model = Path(model)
        self._config = read_config(model)
        family = families.family(str(self._config.get("model_type")))
        self._model = model
        renderer.start()
        self._tokenizer, self._processor = _load(model)
        self._family = family.named(self._tokenizer)
        self._template = templates.trained(templates.chosen(model, self._tokenizer), self._probe)
        self._check_template()
        self._bound(max_pixels, min_pixels, teacher_max_pixels, teacher_min_pixels)
        # Student and teacher get the same question, in every epoch.
        self._rendered = lru_cache(TEXTS)(
            lambda question, images: self._render(content(question, images))
        )
        self._ids = lru_cache(TEXTS)(self._tokenized)
        self._expanded = lru_cache(LAYOUTS)(self._expand)
        self._image_token = self._token(model, self._family.image_token)
        self.banned = tuple(self._token(model, token) for token in self._family.banned)
        self.stop = self._stops(model)

    def encode(
        self, images: Sequence[Image.Image], question: str, policy: Policy = "student"
    ) -> Prompt:
        """The prompt of one user turn, with thinking off.

        `images` are upright and RGB (see `opd.views.images`). They come before the question, or
        take the places of `<image>` in it; if there are more images than markers, the rest follow
        the image of the last marker.
        Raises DataError if the question has more markers than images or contains a reserved token,
        or if an image is too narrow to encode.
        """
        arrays, layouts = self._lay_out(images, self._sizes[policy])
        text = self._text(question, layouts)
        tiles = tuple(
            (number, tile) for number, layout in enumerate(layouts) for tile in layout.tiles
        )
        sizes = tuple(image.size for image in images)
        tokens, positions, visual = self._expanded(text, tiles, sizes)
        return Prompt(tokens, positions, arrays, self._key(images, self._settings[policy]), visual)

    def length(
        self, images: Sequence[tuple[int, int]], question: str, policy: Policy = "student"
    ) -> int:
        """Number of tokens in the prompt that `encode` makes, from the (width, height) of the
        images alone. Raises DataError."""
        try:
            layouts = self._family.layouts(
                self._processor, images, self._sizes[policy], self._config
            )
        except MemoryError:
            raise
        except Exception as error:  # processors raise errors of many classes
            raise _not_encodable(images, error) from error
        tiles = [tile for layout in layouts for tile in layout.tiles]
        text = self._text(question, layouts)
        # In the text one image token stands for all visual tokens of a tile.
        return len(self._ids(text)) + sum(tile.tokens - 1 for tile in tiles)

    def bounded(self, **pixels: int | None) -> PromptEncoder:
        """The same encoder with other bounds on images; `pixels` as for `PromptEncoder`. Raises
        ModelError."""
        other = copy.copy(self)
        other._bound(**pixels)
        return other

    def _bound(
        self,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        teacher_max_pixels: int | None = None,
        teacher_min_pixels: int | None = None,
    ) -> None:
        """Sets the bounds on image size, in pixels. Raises ModelError if the image processor has no
        usable bounds."""
        teacher = teacher_min_pixels or min_pixels, teacher_max_pixels or max_pixels
        try:
            self._sizes = {
                "student": self._family.sizes(self._processor, min_pixels, max_pixels),
                "teacher": self._family.sizes(self._processor, *teacher),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{self._processor_file()}: no bounds on an image's size that can be used:"
                f" {one_line(error)}"
            ) from error
        self._settings = {
            policy: (
                json.dumps(
                    {**self._processor.to_dict(), **sizes}, sort_keys=True, default=str
                ).encode()
            )
            for policy, sizes in self._sizes.items()
        }

    def _text(self, question: str, layouts: Sequence[Layout]) -> str:
        """The prompt's text, with one image token for each tile. Raises DataError if the question
        contains the placeholder or the image token."""
        rendered = self._rendered(question, len(layouts))
        text, *parts = rendered.split(self._family.placeholder)
        if len(parts) != len(layouts):
            raise DataError(
                f"the question {question[:80]!r} contains a reserved token such as"
                f" '{self._family.placeholder}'; remove it"
            )
        for layout, part in zip(layouts, parts, strict=True):
            text += layout.text + part
        tiles = sum(len(layout.tiles) for layout in layouts)
        if np.count_nonzero(self._ids(text) == self._image_token) != tiles:
            raise DataError(
                f"the question {question[:80]!r} contains a reserved token such as"
                f" '{self._family.image_token}'; remove it"
            )
        return text

    def check(self) -> None:
        """Raises ModelError if config.json, weights, tokenizer and image processor do not belong to
        one model."""
        file = self._model / "config.json"
        config = consistency.complete(file, self._config)
        text = config.get("text_config") or config
        self._rows = consistency.check_weights(self._model, config) or text.get("vocab_size")
        if self._rows:
            consistency.check_tokens(self._model, self._tokenizer, self._rows)
        image = (str(self._tokenizer.convert_ids_to_tokens(self._image_token)), self._image_token)
        consistency.check_ids(self._model, self._config, config, image, self._tokenizer)
        for held in (self._config, self._config.get("text_config")):
            consistency.stop_ids(
                file, held.get("eos_token_id") if isinstance(held, dict) else None, self._rows
            )
        self.stop = self._stops(self._model)
        self._check_processor(config)
        try:
            arrays = self.encode([Image.new("RGB", (50, 30), (10, 20, 30))], "?").images.values()
        except DataError as error:
            raise ModelError(f"{self._processor_file()} cannot be used: {error}") from error
        if not all(np.isfinite(array).all() for array in arrays):
            raise ModelError(
                f"{self._processor_file()}: its image_mean, image_std or rescale_factor make pixels"
                " that are not finite"
            )

    def _check_processor(self, config: Mapping[str, Any]) -> None:
        file = self._model / "processor_config.json"
        settings = read_json(file) if file.is_file() else {}
        self._family.check(self._processor, settings, config, self._processor_file())

    def _processor_file(self) -> Path:
        """The file that holds the image processor's settings: processor_config.json if it nests
        them, else preprocessor_config.json."""
        file = self._model / "processor_config.json"
        nested = file.is_file() and "image_processor" in read_json(file)
        return file if nested else self._model / "preprocessor_config.json"

    def max_pixels(self, policy: Policy) -> int:
        """Largest width * height of an image of this policy, to which larger images are scaled
        down."""
        return self._family.most_pixels(self._processor, self._sizes[policy])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a completion, without special tokens."""
        return str(
            self._tokenizer.decode(
                [int(token) for token in tokens],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    def save(self, folder: Path) -> None:
        """Writes tokenizer and chat template into the folder of an export. The written template
        gives the trained prompts without any argument."""
        # The export of an adapter has no tokenizer yet.
        missing = [name for name in TOKENIZER if not (folder / name).exists()]
        inert.copy_files(self._model, folder, missing)
        others = self._model / templates.OTHERS
        missing = [
            file.name
            for file in others.glob("*.jinja")
            if not (folder / templates.OTHERS / file.name).exists()
        ]
        if missing:
            (folder / templates.OTHERS).mkdir(exist_ok=True)
            inert.copy_files(others, folder / templates.OTHERS, missing)
        templates.rewrite(folder, self._template, self._probe)

    def _tokenized(self, text: str) -> IntArray:
        """Token ids of a text. Raises DataError for a text or a token that cannot be encoded."""
        try:
            ids = np.asarray(
                self._tokenizer(text, add_special_tokens=self._adds(text))["input_ids"],
                dtype=np.int32,
            )
        except MemoryError:
            raise
        except Exception as error:  # half a surrogate pair, for example
            raise DataError(
                f"the prompt {text[-200:]!r} cannot be tokenized: {one_line(error)}"
            ) from error
        if self._rows and ids.size and ids.max() >= self._rows:
            token = self._tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise DataError(
                f"the prompt has the token {token!r}, whose id {ids.max()} is beyond the"
                f" {self._rows} rows of the embedding"
            )
        ids.flags.writeable = False
        return ids

    def _expand(
        self, text: str, tiles: tuple[tuple[int, Tile], ...], sizes: tuple[tuple[int, int], ...]
    ) -> tuple[IntArray, IntArray, VisualTokens]:
        """Tokens, positions and visual tokens of a prompt; repeats the image token of every tile in
        `text` for each visual token of the tile.

        `tiles`: (index of the image, tile). `sizes`: (width, height) of the images in pixels.
        Expanding ids is cheap; tokenizing a text of thousands of image tokens would take longer
        than encoding the images.
        """
        compact = self._ids(text)
        copies = np.ones(len(compact), dtype=np.int64)
        copies[compact == self._image_token] = [tile.tokens for _, tile in tiles]
        tokens = np.repeat(compact, copies)
        visual = VisualTokens(
            index=np.flatnonzero(tokens == self._image_token).astype(np.int32),
            image=np.repeat(
                np.array([image for image, _ in tiles], dtype=np.int32),
                [tile.tokens for _, tile in tiles],
            ),
            boxes=np.concatenate(
                [
                    np.zeros((0, 4), dtype=np.float32),
                    *(tile.boxes(*sizes[image]) for image, tile in tiles),
                ]
            ),
        )
        positions = self._family.positions(
            tokens, self._image_token, [tile.grid for _, tile in tiles]
        )
        # Prompts share these arrays.
        for array in (tokens, positions, visual.index, visual.image, visual.boxes):
            array.flags.writeable = False
        return tokens, positions, visual

    def _adds(self, text: str) -> bool:
        """Whether the tokenizer adds special tokens to a rendered prompt; the rule is that of
        `ProcessorMixin.apply_chat_template`. (transformers loads no tokenizer whose file sets
        `add_special_tokens`.)"""
        begin = self._tokenizer.bos_token
        return not (begin and text.startswith(begin))

    def _render(self, content: list[dict[str, str]]) -> str:
        """The text of a prompt. Raises DataError if the template refuses the question, ModelError
        if the template exceeds a bound of `renderer`."""
        try:
            return renderer.render(self._template, content, self._tokenizer.special_tokens_map)
        except renderer.TemplateBoundError as error:
            raise self._unusable(error) from error
        except renderer.TemplateError as error:
            text = content[-1].get("text", "")
            raise DataError(
                f"the chat template refuses the question {text[:80]!r}: {error}"
            ) from error

    def _probe(self, template: str) -> str:
        """The text of a short prompt by `template`. Raises ModelError if the template cannot be
        rendered."""
        try:
            return renderer.render(
                template, [{"type": "text", "text": "?"}], self._tokenizer.special_tokens_map
            )
        except renderer.TemplateError as error:
            raise self._unusable(error) from error

    def _check_template(self) -> None:
        """Raises ModelError if the template does not write one placeholder for one image, as a
        template for text alone does not."""
        text = self._render([{"type": "image"}, {"type": "text", "text": "?"}])
        image = self._family.placeholder
        if text.count(image) != 1:
            raise ModelError(
                f"{self._model}: the chat template writes '{image}' {text.count(image)} times for"
                " one image; put the template for images into chat_template.jinja, and remove the"
                " others"
            )

    def _unusable(self, error: Exception) -> ModelError:
        return ModelError(f"{self._model}: the chat template cannot be rendered: {error}")

    def _lay_out(
        self, images: Sequence[Image.Image], sizes: dict[str, Any]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        """Arguments of the model's forward for `images`, and the layout of each image. Raises
        DataError if the image processor fails."""
        if not images:
            return {}, []
        try:
            return self._family.lay_out(self._processor, images, sizes, self._config)
        except MemoryError:
            raise
        except Exception as error:  # for example ValueError, ZeroDivisionError, OverflowError
            raise _not_encodable([image.size for image in images], error) from error

    def _key(self, images: Sequence[Image.Image], settings: bytes) -> str:
        """A hash of the images' content and of the processor's settings."""
        digest = hashlib.sha256(settings)
        for image in images:
            digest.update(f"{image.mode} {image.width} {image.height};".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()

    def _token(self, model: Path, token: str) -> int:
        """The id of `token`. Raises ModelError if the tokenizer does not have it."""
        number = self._tokenizer.get_vocab().get(token)
        if number is None:
            raise ModelError(
                f"{model}: the tokenizer has no token '{token}', which {self._config['model_type']}"
                " needs"
            )
        return int(number)

    def _stops(self, model: Path) -> tuple[int, ...]:
        """Ids that end a completion: those of generation_config.json, then the tokenizer's. Raises
        ModelError if there are none."""
        path = model / "generation_config.json"
        stated = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = consistency.stop_ids(path, stated, self._rows)
        if self._tokenizer.eos_token_id is not None:
            ids = [*ids, int(self._tokenizer.eos_token_id)]
        stops = tuple(dict.fromkeys(ids))
        if not stops:
            raise ModelError(
                f"{model}: neither generation_config.json nor the tokenizer names an end-of-turn"
                " token"
            )
        return stops


def content(question: str, images: int) -> list[dict[str, str]]:
    """The parts of a user's turn in the form of chat templates: images and the texts between them.

    Raises DataError if the question has more markers than `images`.
    """
    first, *rest = question.split(IMAGE_MARKER)
    if not rest:
        return [{"type": "image"}] * images + [{"type": "text", "text": question}]
    if len(rest) > images:
        markers = plural(len(rest), f"'{IMAGE_MARKER}' marker")
        raise DataError(
            f"the question has {markers} for {plural(images, 'image')}: {question[:80]!r}"
        )
    parts = [{"type": "text", "text": first}]
    for number, text in enumerate(rest, start=1):
        # The last marker also takes the images for which there is no marker.
        count = 1 + images - len(rest) if number == len(rest) else 1
        parts += [{"type": "image"}] * count + [{"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises ModelError if a file of NEEDED is missing, a link
    leads outside, or config.json holds unusable values."""
    if not model.is_dir():
        raise ModelError(f"model folder not found: {model}")
    for names in NEEDED:
        if not any((model / name).is_file() for name in names):
            raise ModelError(
                f"{model} is not a complete model folder: {' or '.join(names)} is missing"
            )
    check_links(model)
    config = read_json(model / "config.json")
    if not config.get("model_type"):
        raise ModelError(f"{model / 'config.json'} has no model_type")
    consistency.check_sizes(model / "config.json", config)
    weight_formats.check_settings(model / "config.json", config)
    return config


def _load(model: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(
            model, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # For broken files transformers raises OSError, ValueError, KeyError, TypeError, Exception.
        raise ModelError(
            f"{model}: tokenizer or image processor cannot be loaded: {one_line(error)}"
        ) from error
    return tokenizer, processor


def _not_encodable(images: Sequence[tuple[int, int]], error: Exception) -> DataError:
    given = ", ".join(f"{width} x {height}" for width, height in images)
    return DataError(f"images of {given} pixels cannot be encoded: {one_line(error)}")
