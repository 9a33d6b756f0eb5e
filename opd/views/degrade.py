"""The view of S2VOPD: in training the student's image is degraded, and the teacher sees it clean.
No boxes are needed.

Source: S2VOPD (arXiv 2608.14144) and the cards of its released models: every image gets exactly one
of three degradations, each with 30 %, or stays as it is, with 10 %. Two at once are left out on
purpose: little that can be learnt is left of such an image. The cards do not say everything, so
these are ours: the sharp part and the smaller image lie anywhere, all places alike; the blurred
image keeps its size, so that the sharp part has the image's own pixels; the sharp part has the
image's shape, and the share is one of area; brightness, contrast and saturation change by at most
JITTER.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL.Image import Image, Resampling
from PIL.Image import new as new_image
from PIL.ImageEnhance import Brightness, Color, Contrast

from opd.types import Example
from opd.views.piece import Piece, Region, Size, whole
from opd.views.view import View, ViewOptions, draws

FOVEATED, ZOOMED_OUT, DOWNSCALED = 0.3, 0.3, 0.3
"""Shares of the images that get each degradation; the other images stay clean."""

BLUR = (0.5, 0.7)
"""Resolution of a foveated image outside of the sharp part, as a share of the image's."""

SHARP = (0.15, 0.35)
"""Share of a foveated image's area that stays sharp."""

ZOOM = (0.4, 0.8)
"""Width and height of a zoomed-out image on its black canvas, as a share of the canvas."""

SCALE = (0.3, 0.6)
"""Width and height of a downscaled image, as a share of the image's."""

JITTER = 0.4
"""Largest change of a downscaled image's brightness, contrast and saturation, as a share of each;
each changes in half of the images."""


class Degrade(View):
    """The teacher sees the whole images; the student, in training, sees each in one of three
    degradations or clean."""

    needs_evidence = False
    changes_student = True

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The whole image."""
        return [whole(size)]

    def student_piece(
        self, example: Example, number: int, size: Size, options: ViewOptions
    ) -> Piece:
        """The image in a degradation that is drawn by the example's id and the run's seed."""
        random = draws(options.seed, f"degrade/{example.id}/{number}")
        drawn = random.random()
        if drawn < FOVEATED:
            return foveated(size, random)
        if drawn < FOVEATED + ZOOMED_OUT:
            return zoomed_out(size, random)
        if drawn < FOVEATED + ZOOMED_OUT + DOWNSCALED:
            return downscaled(size, random)
        return whole(size)


def foveated(size: Size, random: np.random.Generator) -> Piece:
    """An image that is sharp in one part alone, and blurred elsewhere."""
    blurred = _scaled(size, random.uniform(*BLUR))
    sharp = _placed(size, _scaled(size, math.sqrt(random.uniform(*SHARP))), random)
    return Piece((0, 0, *size), size, partial(blur_outside, blurred, sharp))


def zoomed_out(size: Size, random: np.random.Generator) -> Piece:
    """A smaller image on a black canvas of the image's size."""
    place = _placed(size, _scaled(size, random.uniform(*ZOOM)), random)
    return Piece((0, 0, *size), size, partial(shrink, place))


def downscaled(size: Size, random: np.random.Generator) -> Piece:
    """A smaller image, with other brightness, contrast and saturation."""
    smaller = _scaled(size, random.uniform(*SCALE))
    # Always six numbers, so that one of them does not depend on whether another is used.
    changed, strengths = random.random(3) < 0.5, random.uniform(1 - JITTER, 1 + JITTER, 3)
    factors = tuple(np.where(changed, strengths, 1.0).tolist())
    after = partial(jitter, factors) if changed.any() else None
    return Piece((0, 0, *size), smaller, after=after)


def blur_outside(blurred: Size, sharp: Region, image: Image) -> Image:
    """The image at the resolution of an image of size `blurred`, except for the region `sharp`."""
    left, top, right, bottom = sharp
    part = new_image("RGB", (right - left, bottom - top))
    part.paste(image, (-left, -top))
    soft = image.resize(blurred, Resampling.BILINEAR).resize(image.size, Resampling.BILINEAR)
    soft.paste(part, (left, top))
    return soft


def shrink(place: Region, image: Image) -> Image:
    """A black canvas of the image's size with the whole image in the region `place`."""
    left, top, right, bottom = place
    canvas = new_image("RGB", image.size)
    canvas.paste(image.resize((right - left, bottom - top), Resampling.BICUBIC), (left, top))
    return canvas


def jitter(factors: Sequence[float], image: Image) -> Image:
    """The image with brightness, contrast and saturation multiplied by `factors`, in this order."""
    for enhance, factor in zip((Brightness, Contrast, Color), factors, strict=True):
        image = enhance(image).enhance(factor) if factor != 1 else image
    return image


def _scaled(size: Size, factor: float) -> Size:
    """`size` times `factor`, in whole pixels, at least one."""
    width, height = size
    return max(1, round(width * factor)), max(1, round(height * factor))


def _placed(size: Size, part: Size, random: np.random.Generator) -> Region:
    """A region of size `part` somewhere in an image of `size`."""
    left, top = (int(random.integers(0, a - b + 1)) for a, b in zip(size, part, strict=True))
    return left, top, left + part[0], top + part[1]
