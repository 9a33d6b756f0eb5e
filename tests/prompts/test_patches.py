"""Patches of the Qwen families against transformers' own image processor, to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from opd.prompts import families
from tests.support.random_models import SOURCE

SIZES = [
    [(128, 128)],
    [(48, 80), (200, 33)],
    [(7, 9)],
    [(901, 640)],
    [(64, 64), (64, 64), (31, 77)],
]


def processor_of(**settings):
    return AutoImageProcessor.from_pretrained(
        SOURCE, backend="pil", local_files_only=True, **settings
    )


def silent(processor):
    """The same processor, which must not be called."""

    def call(*_, **__):
        raise AssertionError("the processor runs itself")

    kind = type(processor)
    made = copy.copy(processor)
    made.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return made


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bounds", [(None, None), (4096, 20000)])
@pytest.mark.parametrize("mean", [[0.5, 0.5, 0.5], [0.48145466, 0.4578275, 0.40821073]])
def test_patches_are_the_processors(sizes, bounds, mean):
    """And are cut without it."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    processor = processor_of(image_mean=mean)
    family = families.family("qwen3_vl")
    options = family.sizes(processor, *bounds)
    ours, layouts = family.lay_out(silent(processor), images, options, {})
    theirs = processor(images=images, return_tensors="np", **options)
    for name in ("pixel_values", "image_grid_thw"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert [tile.grid for layout in layouts for tile in layout.tiles] == [
        (rows // 2, columns // 2) for _, rows, columns in theirs["image_grid_thw"]
    ]


def test_a_processor_with_other_steps_runs_itself():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    processor = processor_of(do_normalize=False)
    family = families.family("qwen3_vl")
    options = family.sizes(processor, None, None)
    ours, _ = family.lay_out(processor, [image], options, {})
    assert ours["pixel_values"].min() >= 0
    with pytest.raises(AssertionError, match="runs itself"):
        family.lay_out(silent(processor), [image], options, {})
    np.testing.assert_array_equal(
        ours["pixel_values"],
        processor(images=[image], return_tensors="np", **options)["pixel_values"],
    )
