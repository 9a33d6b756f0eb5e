"""What the student sees where its images are degraded: each degradation against numpy or Pillow's
own steps, how often each occurs, and that nothing but id and seed decides."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opd.types import Example
from opd.views import degrade
from opd.views.images import student_images, student_pieces, teacher_images
from opd.views.view import ViewOptions
from tests.views.test_views import noise, pixels

OPTIONS = ViewOptions(kind="degrade").seeded(7)
CHANGES = {degrade.blur_outside: "foveated", degrade.shrink: "zoomed out"}


def example(id="a", *images):
    return Example(id, images or (noise(80, 60),), "What?")


def piece_of(id, options=OPTIONS, size=(1000, 800)):
    one = Example(id, (Image.new("1", (9, 9)),), "What?")
    (piece,) = student_pieces(one, options, [size])
    return piece


def kind_of(piece, size=(1000, 800)):
    if isinstance(piece.change, partial) and piece.change.func in CHANGES:
        return CHANGES[piece.change.func]
    return "clean" if piece.size == size else "downscaled"


def test_shares_are_those_of_the_paper():
    """And so are the ranges: all of them are reached, and nothing outside."""
    pieces = [piece_of(f"row-{number}") for number in range(10_000)]
    counts = Counter(map(kind_of, pieces))
    expected = {"foveated": 0.3, "zoomed out": 0.3, "downscaled": 0.3, "clean": 0.1}
    assert counts.keys() == expected.keys()
    for kind, share in expected.items():
        assert counts[kind] == pytest.approx(10_000 * share, abs=180)
    scales, areas, blurs, zooms, changed = [], [], [], [], Counter()
    for piece in pieces:
        kind = kind_of(piece)
        if kind == "downscaled":
            scales.append(piece.size[0] / 1000)
            assert piece.size[1] == pytest.approx(800 * scales[-1], abs=1)
            factors = piece.after.args[0] if piece.after else (1, 1, 1)
            changed.update(place for place, factor in enumerate(factors) if factor != 1)
            assert all(0.6 <= factor <= 1.4 for factor in factors)
        elif kind == "foveated":
            (blurred, (left, top, right, bottom)) = piece.change.args
            blurs.append(blurred[0] / 1000)
            areas.append((right - left) * (bottom - top) / 800_000)
            assert 0 <= left < right <= 1000
            assert 0 <= top < bottom <= 800
        elif kind == "zoomed out":
            ((left, top, right, bottom),) = piece.change.args
            zooms.append((right - left) / 1000)
            assert 0 <= left < right <= 1000
            assert 0 <= top < bottom <= 800
    for values, low, high in (
        (scales, 0.3, 0.6),
        (areas, 0.15, 0.35),
        (blurs, 0.5, 0.7),
        (zooms, 0.4, 0.8),
    ):
        assert min(values) == pytest.approx(low, abs=0.01)
        assert max(values) == pytest.approx(high, abs=0.01)
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.01)
    for place in range(3):  # brightness, contrast, saturation
        assert changed[place] == pytest.approx(counts["downscaled"] / 2, abs=100)


def test_a_degradation_is_of_id_image_and_seed_alone():
    ids = [f"row-{number}" for number in range(200)]
    drawn = [(kind_of(piece), piece.size) for piece in map(piece_of, ids)]
    assert drawn == [(kind_of(piece), piece.size) for piece in map(piece_of, ids)]
    other = ViewOptions(kind="degrade").seeded(8)
    assert drawn != [(kind_of(p), p.size) for p in (piece_of(id, other) for id in ids)]
    assert drawn != [(kind_of(p), p.size) for p in map(piece_of, ids[::-1])]
    one, size = Example("a", (Image.new("1", (9, 9)),) * 40, "What?"), (1000, 800)
    assert len({piece.size for piece in student_pieces(one, OPTIONS, [size] * 40)}) > 5
    image = noise(80, 60)
    for id in ids[:20]:
        first, second = (student_images(example(id, image), OPTIONS) for _ in range(2))
        assert first[0].tobytes() == second[0].tobytes()


def test_the_teacher_sees_the_clean_image():
    for number in range(12):
        one = example(f"row-{number}")
        (image,) = teacher_images(one, OPTIONS)
        assert image is one.images[0]


def test_a_foveated_image_has_its_own_pixels_in_one_part_alone():
    image = noise(80, 60)
    seen = pixels(degrade.blur_outside((40, 30), (10, 20, 50, 55), image))
    soft = image.resize((40, 30), Image.Resampling.BILINEAR).resize(
        (80, 60), Image.Resampling.BILINEAR
    )
    expected = pixels(soft).copy()
    expected[20:55, 10:50] = pixels(image)[20:55, 10:50]
    np.testing.assert_array_equal(seen, expected)
    assert (pixels(soft) != pixels(image)).mean() > 0.9


def test_a_zoomed_out_image_lies_on_black():
    image = noise(80, 60)
    seen = pixels(degrade.shrink((13, 7, 53, 37), image))
    expected = np.zeros((60, 80, 3), np.uint8)
    expected[7:37, 13:53] = pixels(image.resize((40, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(seen, expected)


def test_brightness_contrast_and_saturation():
    """Against the blends that define them: with black, with the mean grey, with the greys."""
    values = pixels(noise(40, 30)).astype(float)

    def close(factors, expected):
        """Up to the rounding of each step."""
        seen = pixels(degrade.jitter(factors, noise(40, 30))).astype(float)
        steps = sum(factor != 1 for factor in factors)
        assert np.abs(seen - np.clip(expected, 0, 255)).max() <= steps

    grey = values @ (0.299, 0.587, 0.114)
    close((1.3, 1, 1), 1.3 * values)
    close((1, 0.7, 1), 0.7 * values + 0.3 * np.round(grey.mean()))
    close((1, 1, 1.2), 1.2 * values - 0.2 * np.round(grey)[..., None])
    close((1, 1, 1), values)
    close((0.5, 1, 0.5), 0.5 * (0.5 * values) + 0.5 * (0.5 * grey)[..., None])


def test_a_downscaled_image_stays_small():
    """And its colours change after that: in the small image there are fewer pixels to change."""
    ids = (f"row-{number}" for number in range(100))
    id = next(id for id in ids if piece_of(id).after)
    piece = piece_of(id, size=(80, 60))
    one = example(id)
    (seen,) = student_images(one, OPTIONS)
    assert seen.size == piece.size
    smaller = one.images[0].resize(piece.size, Image.Resampling.BICUBIC)
    assert seen.tobytes() == (piece.after(smaller) if piece.after else smaller).tobytes()


@given(st.integers(1, 40), st.integers(1, 40), st.text(max_size=4), st.integers(0, 2**63 - 1))
def test_every_picture_can_be_degraded(width, height, id, seed):
    one = example(id, noise(width, height))
    before = one.images[0].tobytes()
    (seen,) = student_images(one, OPTIONS.seeded(seed))
    assert 1 <= seen.width <= width
    assert 1 <= seen.height <= height
    assert one.images[0].tobytes() == before


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.integers(0, 2**32))
def test_sizes_of_huge_pictures_are_known_without_them(width, height, seed):
    piece = piece_of("a", OPTIONS.seeded(seed), (width, height))
    assert 1 <= piece.size[0] <= width
    assert 1 <= piece.size[1] <= height


def test_an_id_may_hold_half_a_surrogate_pair():
    assert piece_of("\ud800").size
