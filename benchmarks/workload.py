"""Makes models and groups to measure: random weights, and random tokens at chosen shapes.

Every prompt has one image. Legend: P tokens of the student's prompt, C tokens of the teacher's
prompt (with the crop), R tokens of each completion, n completions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from opd.prompts.families import family
from opd.types import Completion, Group, ModelOptions, Prompt, VisualTokens
from opd_torch.backend import TorchBackend
from opd_torch.model import Model

transformers.utils.logging.disable_progress_bar()

VISION_4B = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "depth": 24,
    "num_heads": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
}
SPECIAL = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def qwen3_vl_4b(**text: int) -> Any:
    """The configuration of Qwen3-VL-4B-Instruct; `text` overrides sizes of the language model."""
    sizes = {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        **text,
    }
    third = sizes["head_dim"] // 6
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_interleaved": True,
        "mrope_section": [sizes["head_dim"] // 2 - 2 * third, third, third],
    }
    vision = {
        **VISION_4B,
        "out_hidden_size": sizes["hidden_size"],
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return transformers.Qwen3VLConfig(
        text_config={**sizes, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config=vision,
        tie_word_embeddings=True,
        **SPECIAL,
    )


def small_qwen3_vl() -> Any:
    """A configuration of Qwen3-VL that a CPU runs in a second."""
    config = qwen3_vl_4b(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    for key, value in {
        "hidden_size": 64,
        "intermediate_size": 128,
        "depth": 4,
        "num_heads": 4,
        "deepstack_visual_indexes": [1, 2],
    }.items():
        setattr(config.vision_config, key, value)
    for number, key in enumerate(SPECIAL):
        setattr(config, key, 2040 + number)
    return config


def qwen3_5_4b() -> Any:
    """The configuration of Qwen3.5-4B: every fourth layer is gated attention, the others are gated
    delta nets."""
    text = {
        "vocab_size": 248320,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "tie_word_embeddings": True,
    }
    special = {
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
    }
    return transformers.Qwen3_5Config(
        text_config=text,
        vision_config={**VISION_4B, "out_hidden_size": 2560},
        tie_word_embeddings=True,
        **special,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"qwen3-vl-4b": qwen3_vl_4b, "qwen3.5-4b": qwen3_5_4b}
"""Configurations of real models by name. A new model needs an entry here and, for a new kind of
layer, a cost in `arithmetic`."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a group: P, R, n and C. With `crop` 0 the teacher reads the student's prompt."""

    prompt: int
    completion: int
    n: int
    crop: int = 0

    def __str__(self) -> str:
        return f"P {self.prompt}, R {self.completion}, n {self.n}, " + (
            f"crop {self.crop}" if self.crop else "same prompt"
        )


def grid(length: int) -> tuple[int, int]:
    """Rows and columns of visual tokens in a prompt of `length` tokens: nearly a square, which
    leaves about 32 tokens of text."""
    image = length - max(4, min(32, length // 8))
    rows = max(1, int(np.sqrt(image)))
    return rows, image // rows


def visual_tokens(length: int) -> int:
    """The number of visual tokens in a prompt of `length` tokens."""
    rows, columns = grid(length)
    return rows * columns


def prompt(config: Any, length: int, seed: int = 0) -> Prompt:
    """A prompt of `length` tokens, most of which are the visual tokens of one image."""
    rng = np.random.default_rng([seed, length])
    rows, columns = grid(length)
    text = length - rows * columns
    vision = config.vision_config
    merge = vision.spatial_merge_size
    low = min(
        value
        for key, value in config.to_dict().items()
        if key.endswith("_token_id") and isinstance(value, int)
    )
    words = rng.integers(0, min(low, config.text_config.vocab_size), size=text).astype(np.int32)
    # mlx-vlm locates an image by the token before it.
    words[text // 2 - 1 : text // 2 + 1] = config.vision_start_token_id, config.vision_end_token_id
    image = np.full(rows * columns, config.image_token_id, np.int32)
    tokens = np.concatenate([words[: text // 2], image, words[text // 2 :]])
    patches = rows * columns * merge**2
    # A still image: the frames of a patch are alike.
    still = rng.normal(size=(patches, vision.in_channels, 1, vision.patch_size**2)).astype(
        np.float32
    )
    index = np.flatnonzero(tokens == config.image_token_id).astype(np.int32)
    return Prompt(
        tokens=tokens,
        positions=family(config.model_type).positions(
            tokens, config.image_token_id, [(rows, columns)]
        ),
        images={
            "pixel_values": still.repeat(vision.temporal_patch_size, 2).reshape(patches, -1),
            "image_grid_thw": np.array([[1, rows * merge, columns * merge]], np.int32),
        },
        key=f"{seed}-{length}",
        visual=VisualTokens(
            index, np.zeros(len(index), np.int32), np.zeros((len(index), 4), np.float32)
        ),
    )


def group(config: Any, shape: Shape, seed: int = 0) -> Group:
    """A group of `shape` with random completions; every token's weight is 1 / tokens, as in a
    step."""
    rng = np.random.default_rng(seed + 1)
    student = prompt(config, shape.prompt, seed)
    low = min(
        value
        for key, value in config.to_dict().items()
        if key.endswith("_token_id") and isinstance(value, int)
    )
    low = min(low, config.text_config.vocab_size)
    completions = tuple(
        Completion(
            rng.integers(0, low, size=shape.completion).astype(np.int32),
            np.zeros(shape.completion, np.float32),
            finished=False,
        )
        for _ in range(shape.n)
    )
    weight = np.full(shape.completion, 1 / (shape.n * shape.completion), np.float32)
    teacher = prompt(config, shape.crop, seed + 1) if shape.crop else student
    return Group(student, teacher, completions, (weight,) * shape.n)


def rows_of(group: Group) -> list[Group]:
    """Splits a group into groups of one completion each."""
    return [
        replace(group, completions=(completion,), weights=(weights,))
        for completion, weights in zip(group.completions, group.weights, strict=True)
    ]


def model(config: Any, device: str, seed: int = 0) -> Any:
    """A transformers model with random weights, made on `device`."""
    torch.manual_seed(seed)
    with torch.device(device):
        architecture = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa"
        )
    return architecture.eval()


def policy(made: Any, dtype: str = "float32") -> Model:
    """A transformers model in memory as the torch backend computes it; `made` is changed."""
    from opd_torch.device import this_device
    from opd_torch.families import family as torch_family
    from opd_torch.kernels.pointwise import replace_modules
    from opd_torch.model import DTYPES

    family, device = (
        torch_family(made.config.model_type),
        this_device(str(next(made.parameters()).device), dtype),
    )
    replace_modules(made, device, DTYPES[dtype])
    return Model(family, made, family.layers(made), DTYPES[dtype], device, None)


def backend(made: Any, dtype: str = "float32") -> TorchBackend:
    """The torch backend on a model in memory, without a folder; the teacher is a copy."""
    return TorchBackend(ModelOptions(Path(), dtype), policy(made, dtype))


def on_device(backend: TorchBackend, **settings: Any) -> None:
    """Changes settings of a backend's device record."""
    for policy in ("_student", "_teacher"):
        model = getattr(backend, policy)
        setattr(backend, policy, replace(model, device=replace(model.device, **settings)))


def folder(path: Path, vocabulary: int = 0, **sizes: int) -> Path:
    """Writes a random Qwen3-VL into a folder that both backends and all peers can read.

    `vocabulary` gives the embedding more rows than the tokenizer has; 0 leaves the rows as they
    are.
    """
    from tests.support import random_models

    random_models.qwen3_vl(path, **sizes)
    if vocabulary:
        widen(path, vocabulary)
    return path


def widen(path: Path, vocabulary: int) -> None:
    """Gives the embedding of a model folder, and so the tied head, `vocabulary` rows."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    name = "model.language_model.embed_tokens.weight"
    rows = (
        np.random.default_rng(1)
        .standard_normal((vocabulary, tensors[name].shape[1]))
        .astype(np.float32)
    )
    tensors[name] = 0.3 * rows
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = vocabulary
    (path / "config.json").write_text(json.dumps(config))


def perturb_teacher(backend: Any, amount: float = 0.1) -> None:
    """Moves the teacher away from the student, so that divergence and gradient are not 0."""
    device = next(iter(backend._teacher.parameters.values())).device
    generator = torch.Generator(device).manual_seed(7)
    with torch.no_grad():
        for parameter in backend._teacher.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.add_(amount * parameter.std() * noise)
