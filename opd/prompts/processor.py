"""Encodes prompts of a model without a family file, with the model's own processor in transformers.

Only the model's files describe such a model: image size cannot be bounded, and every visual token
is said to cover the whole image. A model whose prompts need more than consecutive positions and
image arrays raises ModelError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image, new

from opd.errors import DataError, ModelError, one_line, plural
from opd.models.consistency import complete
from opd.models.files import read_json
from opd.prompts import families, renderer, templates
from opd.prompts.encoder import PromptEncoder, content, read_config
from opd.prompts.families.layout import counted, plain
from opd.types import MAX_PIXELS, IntArray, Policy, Prompt, VisualTokens

LARGE = (4096, 3072)
"""Width and height of a large photograph; its encoding shows how many pixels the processor keeps at
most."""

PIXELS = ("max_pixels", "min_pixels", "teacher_max_pixels", "teacher_min_pixels")


def open_encoder(model: Path, **pixels: int | None) -> PromptEncoder:
    """The checked encoder of a model folder: `PromptEncoder` for a supported family, else
    `ProcessorEncoder`. `pixels` as for `PromptEncoder`.

    Raises ModelError.
    """
    config = read_config(model)
    kind = str(config["model_type"])
    if kind in families.model_types():
        complete(model / "config.json", config)  # its error says more than that of loading
    if kind in families.model_types() or not _known(kind):
        return _checked(PromptEncoder(model, **pixels))
    return _checked(ProcessorEncoder(model, **pixels))


def without_family(model: Path) -> str:
    """The model_type of a model that transformers supports and that has no family file; empty for
    any other model. Raises ModelError."""
    kind = str(read_config(model)["model_type"])
    return kind if kind not in families.model_types() and _known(kind) else ""


def _checked(encoder: PromptEncoder) -> PromptEncoder:
    encoder.check()
    return encoder


def needs_torchvision(model: Path) -> str:
    """The class name of the model's processor in transformers if a part of it needs torchvision;
    else empty.

    Training does not use that part; serving an export with `AutoProcessor` does.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(read_json(model / "config.json").get("model_type"), "")
    processor = getattr(transformers, name, None) if name else None
    return name if "video_processor" in getattr(processor, "get_attributes", list)() else ""


class ProcessorEncoder(PromptEncoder):
    """Encodes prompts with the model's own processor."""

    def __init__(self, model: Path, **pixels: int | None) -> None:
        """Loads the processor from a folder; downloads nothing. Raises ModelError if the model
        cannot be encoded, or `pixels` asks for a bound that the processor does not have."""
        self._model, self._config = Path(model), read_config(Path(model))
        kind = self._config["model_type"]
        if "mrope_section" in json.dumps(self._config):
            raise ModelError(
                f"{model}: models of type '{kind}' have positions of several axes, for which they"
                " need a file in opd/prompts/families"
            )
        image = self._config.get("image_token_id", self._config.get("image_token_index"))
        if not isinstance(image, int):
            raise ModelError(
                f"{model / 'config.json'}: no image_token_id, so nobody can tell where images stand"
            )
        renderer.start()
        self._processor = _load(self._model)
        self._tokenizer, self._image_token = self._processor.tokenizer, image
        self._template = templates.trained(
            templates.chosen(self._model, self._tokenizer), self._probe
        )
        self.stop = self._stops(self._model)
        named = _special(self._processor) | _special(self._tokenizer)
        numbers = {
            image,
            *(
                int(self._tokenizer.convert_tokens_to_ids(token))
                for token in named
                if token in self._tokenizer.get_vocab()
            ),
        }
        self.banned = tuple(sorted(numbers - set(self.stop)))
        self._reserved = {
            str(self._tokenizer.convert_ids_to_tokens(number)) for number in self.banned
        }
        self._check_bounds(pixels)
        self._made = json.dumps(self._processor.to_dict(), sort_keys=True, default=str).encode()

    def encode(self, images: Sequence[Image], question: str, policy: Policy = "student") -> Prompt:
        """The prompt of one user turn, the same for both policies.

        Raises DataError if question and images cannot be encoded, ModelError if the processor
        returns arrays that are not image arrays.
        """
        parts = content(question, len(images))
        for token in self._reserved:
            if any(token in part.get("text", "") for part in parts):
                raise DataError(
                    f"the question {question[:80]!r} contains a reserved token such as '{token}';"
                    " remove it"
                )
        arrays = self._process(parts, images)
        tokens = arrays.pop("input_ids")[0].astype(np.int32)
        arrays.pop("attention_mask", None)
        for name, value in arrays.items():
            if value.dtype == object or value.shape[:2] == (1, len(tokens)):
                shape = (
                    "arrays of unequal sizes"
                    if value.dtype == object
                    else "a value for every token"
                )
                raise ModelError(
                    f"{self._model}: its processor gives {shape} as {name}, for which it needs a"
                    " file in opd/prompts/families"
                )
        index = np.flatnonzero(tokens == self._image_token).astype(np.int32)
        if bool(len(index)) != bool(images):
            written = plural(len(index), "image token")
            raise ModelError(
                f"{self._model}: its processor writes {written} for {plural(len(images), 'image')}"
            )
        owner = self._owners(index, images)
        sizes = np.array(
            [(0, 0, image.width, image.height) for image in images], np.float32
        ).reshape(-1, 4)
        return Prompt(
            tokens=tokens,
            positions=counted(tokens),
            images={name: plain(value) for name, value in arrays.items()},
            key=self._key(images, self._made),
            visual=VisualTokens(index, owner, sizes[owner]),
        )

    def _check_processor(self, config: Mapping[str, Any]) -> None:
        """Checks nothing, since only families describe a vision tower; `check` encodes an image."""

    def max_pixels(self, policy: Policy) -> int:
        """The largest bound of a published model, since the processor does not say its own."""
        return MAX_PIXELS

    def length(
        self, images: Sequence[tuple[int, int]], question: str, policy: Policy = "student"
    ) -> int:
        """Number of tokens in a prompt. Encodes blank images, since only the processor knows."""
        return len(self.encode([new("RGB", size) for size in images], question, policy))

    def _check_bounds(self, pixels: Mapping[str, int | None]) -> None:
        """Raises ModelError for a bound in `pixels` that the processor does not keep by itself,
        since it takes no bounds."""
        for name in PIXELS:
            if (bound := pixels.get(name)) is None:
                continue
            if "max" in name:
                arrays = self._process([{"type": "image"}], [new("RGB", LARGE)]).values()
                values = sum(
                    array.size for array in arrays if np.issubdtype(array.dtype, np.floating)
                )
                if values // 3 <= bound:  # three channels
                    continue
            kind = self._config["model_type"]
            raise ModelError(
                f"model.{name}: models of type '{kind}' have no file that says how to bound their"
                " images; leave it at 0"
            )

    def _process(
        self, parts: Sequence[Mapping[str, str]], images: Sequence[Image]
    ) -> dict[str, Any]:
        """The arrays that the processor makes of one user turn, by name: `input_ids` [1, P] and
        others. Like `apply_chat_template`, but the template is rendered with bounds.

        Raises DataError if the processor fails.
        """
        text = self._render(
            [
                {**part, "image": "<Image>"} if part["type"] == "image" else dict(part)
                for part in parts
            ]
        )
        options = {} if self._adds(text) else {"add_special_tokens": False}
        try:
            encoded = self._processor(
                text=[text],
                images=[list(images)] if images else None,
                return_tensors="np",
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:  # processors raise errors of many classes
            given = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise DataError(
                f"images of {given} pixels and {parts[-1].get('text', '')[:80]!r} cannot be"
                f" encoded: {one_line(error)}"
            ) from error
        return {name: np.asarray(value) for name, value in encoded.items()}

    def _owners(self, index: IntArray, images: Sequence[Image]) -> IntArray:
        """Index [S] of the image of each visual token at the places `index` [S].

        Each image has one run of visual tokens; if there are more runs than images, each image has
        as many tokens as it has in a prompt of its own. Raises DataError if these do not add up.
        """
        run = np.cumsum(np.diff(index, prepend=index[:1]) > 1, dtype=np.int32)
        if len(images) < 2 or run[-1] + 1 == len(images):
            return run if len(images) > 1 else np.zeros_like(run)
        alone = [self._process([{"type": "image"}], [image])["input_ids"] for image in images]
        counts = [int((tokens == self._image_token).sum()) for tokens in alone]
        if sum(counts) != len(index):
            raise DataError(
                f"{self._model}: its processor lays {len(images)} images out in another way than"
                " one; give one image a row"
            )
        return np.repeat(np.arange(len(images), dtype=np.int32), counts)


def _known(kind: str) -> bool:
    """Whether transformers has a model of this type that answers questions about images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load(model: Path) -> Any:
    from transformers import AutoProcessor

    reasons = []
    # Pillow gives the same pixels on every machine, but some processors need torchvision.
    for choice in ({"backend": "pil"}, {}):
        try:
            processor = AutoProcessor.from_pretrained(
                model, local_files_only=True, trust_remote_code=False, **choice
            )
            break
        except Exception as error:
            # transformers raises ImportError, OSError, ValueError, KeyError, TypeError, Exception.
            reasons.append(error)
    else:
        said = str(reasons[-1]).lower()
        why = f"cannot be loaded: {one_line(reasons[-1])}"
        if "torchvision" in said:
            why = "needs torchvision, which is not installed"
        elif "trust_remote_code" in said:
            why = (
                "needs Python code of its own files, which is never run; name a model whose"
                " processor transformers has"
            )
        raise ModelError(f"{model}: its own processor {why}") from reasons[-1]
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise ModelError(
            f"{model}: its files name no processor of images and text; processor_config.json or"
            " preprocessor_config.json is needed"
        )
    return processor


def _special(holder: Any) -> set[str]:
    """Special tokens for images and videos, such as `image_token`, that a processor or tokenizer
    has as attributes."""
    marks = ("image", "video", "boi", "eoi")
    names = [
        name
        for name in dir(type(holder)) + list(vars(holder))
        if name.endswith("token") and any(mark in name for mark in marks)
    ]
    values = [getattr(holder, name, None) for name in names] + [
        value
        for name, value in getattr(holder, "special_tokens_map", {}).items()
        if any(mark in name for mark in marks)
    ]
    return {str(value) for value in values if isinstance(value, str) or hasattr(value, "content")}
