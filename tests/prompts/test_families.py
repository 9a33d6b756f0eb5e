"""Every family's prompts against its own processor and its own position code, and what a bound on
pixels does."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from opd.errors import ModelError
from opd.prompts.encoder import PromptEncoder
from tests.support import random_models
from tests.support.prompt_cases import QUESTION, expected, tokenizer_of

pytest.importorskip("torch")

# that one has tests/prompts/test_encoder.py
FAMILIES = [name for name in random_models.FAMILIES if name != "qwen3_vl"]
SIZES = [
    [(64, 64)],
    [(20, 20)],
    [(200, 50)],
    [(50, 200)],
    [(97, 61)],
    [(300, 300)],
    [(40, 40), (120, 64)],
    [(500, 40), (24, 24), (64, 160)],
    [],
]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return random_models.FAMILIES[name](tmp_path_factory.mktemp(name))


def noise(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def same(prompt, theirs):
    np.testing.assert_array_equal(prompt.tokens, theirs["input_ids"][0])
    assert prompt.images.keys() == theirs.keys() & {
        "pixel_values",
        "image_grid_thw",
        "pixel_attention_mask",
    }
    for key, value in prompt.images.items():
        wanted = theirs[key][0] if value.ndim == theirs[key].ndim - 1 else theirs[key]
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_prompts_are_the_own_processors(name, folder, sizes):
    images = [noise(size, seed) for seed, size in enumerate(sizes)]
    prompt = PromptEncoder(folder).encode(images, QUESTION)
    theirs = expected(name, folder, images)
    same(prompt, theirs)
    image_token = {"gemma3": "<image_soft_token>", "smolvlm": "<image>"}.get(name, "<|image_pad|>")
    number = tokenizer_of(folder).convert_tokens_to_ids(image_token)
    np.testing.assert_array_equal(prompt.visual.index, np.flatnonzero(prompt.tokens == number))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_positions_are_the_own_models(name, folder, sizes):
    """Qwen's from `get_rope_index`; the others count."""
    import torch
    import transformers

    images = [noise(size, seed) for seed, size in enumerate(sizes)]
    prompt = PromptEncoder(folder).encode(images, QUESTION)
    if not name.startswith("qwen"):
        np.testing.assert_array_equal(prompt.positions, [np.arange(len(prompt))])
        return
    model = {"qwen2_5_vl": "Qwen2_5_VLModel", "qwen3_5": "Qwen3_5Model"}[name]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, model)
    bare = SimpleNamespace(config=config)
    bare.get_vision_position_ids = MethodType(kind.get_vision_position_ids, bare)
    types = torch.zeros(1, len(prompt), dtype=torch.int32)
    types[0, torch.tensor(prompt.visual.index).long()] = 1
    grid = torch.from_numpy(prompt.images["image_grid_thw"]) if sizes else None
    positions, deltas = kind.get_rope_index(
        bare, torch.tensor(prompt.tokens)[None].long(), types, image_grid_thw=grid
    )
    np.testing.assert_array_equal(prompt.positions, positions[:, 0])
    assert prompt.start == len(prompt) + int(deltas[0])


def test_every_visual_token_looks_at_its_part_of_its_image(name, folder):
    """Tiles of an image cover it exactly: once, and once more as a whole where a family shows the
    whole image too."""
    sizes = [(200, 50), (64, 64)]
    prompt = PromptEncoder(folder).encode([noise(size) for size in sizes], QUESTION)
    for number, (width, height) in enumerate(sizes):
        boxes = prompt.visual.boxes[prompt.visual.image == number]
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
        assert area == pytest.approx(width * height * (2 if name == "smolvlm" else 1), rel=1e-5)
        assert boxes.min() >= 0
        np.testing.assert_allclose(boxes[:, 2:].max(0), (width, height), rtol=1e-6)


def test_a_bound_on_pixels(name, folder):
    """The processor's own result at that bound; Gemma 3's images have one size, which a bound may
    allow."""
    images = [noise((160, 160)), noise((200, 50))]
    if name == "gemma3":
        with pytest.raises(ModelError, match="gemma3 sees every image at 64 x 64 pixels"):
            PromptEncoder(folder, max_pixels=4095)
        same(
            PromptEncoder(folder, max_pixels=4096).encode(images, QUESTION),
            expected(name, folder, images),
        )
        return
    limit = 64 * 64
    bounds = (
        {"size": {"longest_edge": 64}}
        if name == "smolvlm"
        else {"size": {"shortest_edge": 256, "longest_edge": limit}}
    )
    prompt = PromptEncoder(folder, max_pixels=limit).encode(images, QUESTION)
    same(prompt, expected(name, folder, images, **bounds))
    free = PromptEncoder(folder).encode(images, QUESTION)
    assert len(prompt) < len(free)
    assert prompt.key != free.key


def test_a_reserved_token_in_the_question_is_refused(name, folder):
    from opd.errors import DataError

    word = {
        "gemma3": "<image_soft_token>",
        "smolvlm": "<global-img><fake_token_around_image><image>",
    }.get(name, "<|image_pad|>")
    with pytest.raises(DataError):
        PromptEncoder(folder).encode(
            [noise((64, 64))],
            f"what is {word}?" if name != "smolvlm" else f"{word} or <image> or <image>?",
        )
