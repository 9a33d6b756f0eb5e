"""Opens the images that each policy sees: the student sees the whole images, or, in training, what
the recipe's view makes of them; the teacher sees those of the view."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL.Image import Image, Resampling
from PIL.Image import new as new_image

from opd.data.images import image_size, open_image
from opd.types import MAX_PIXELS, Example
from opd.views.piece import Piece, Region, Size
from opd.views.view import ViewOptions


def student_images(example: Example, options: ViewOptions | None = None) -> list[Image]:
    """The example's images, upright and RGB; with `options`, as the student sees them in training
    on this view. Raises DataError if an image cannot be read."""
    images = [open_image(source, example.max_image_pixels) for source in example.images]
    if options is None:
        return images
    pieces = student_pieces(example, options, [image.size for image in images])
    return [_cut(image, piece) for image, piece in zip(images, pieces, strict=True)]


def student_pieces(example: Example, options: ViewOptions, sizes: Sequence[Size]) -> list[Piece]:
    """What the student sees in training of each image of an example; `sizes` are the images'."""
    view, pieces = options.view, []
    for number, size in enumerate(sizes):
        piece = view.student_piece(example, number, size, options)
        _check_pieces([piece], size, options, None)
        pieces.append(piece)
    return pieces


def teacher_images(
    example: Example, options: ViewOptions, max_pixels: int | None = MAX_PIXELS
) -> list[Image]:
    """The images that the teacher sees, upright and RGB, in the order of the question's images;
    `views_per_image` counts them for each of these.

    A crop is not enlarged above `max_pixels`. Raises DataError if an image cannot be read, or if
    the example lacks what the view needs.
    """
    view, counts = options.view, []
    images: list[Image] = []
    for number, source in enumerate(view.sources(example, options)):
        image = open_image(source, example.max_image_pixels)
        pieces = view.pieces(example, number, image.size, options, max_pixels)
        _check_pieces(pieces, image.size, options, max_pixels)
        images += [_cut(image, piece) for piece in pieces]
        counts.append(len(pieces))
    _check_counts(example, options, counts)
    return images


def views_per_image(example: Example, options: ViewOptions) -> list[int]:
    """The number of teacher's images in the place of each image of the question."""
    return options.view.counts(example, options)


def teacher_sizes(
    example: Example,
    options: ViewOptions,
    max_pixels: int | None = MAX_PIXELS,
    size_of: Callable[..., Size] = image_size,
) -> list[Size]:
    """The sizes of `teacher_images`, read from the headers of files alone. `size_of`: `image_size`,
    or the same with a cache. Raises DataError."""
    view, counts = options.view, []
    sizes: list[Size] = []
    for number, source in enumerate(view.sources(example, options)):
        size = size_of(source, example.max_image_pixels)
        pieces = view.pieces(example, number, size, options, max_pixels)
        _check_pieces(pieces, size, options, max_pixels)
        sizes += [piece.size for piece in pieces]
        counts.append(len(pieces))
    _check_counts(example, options, counts)
    return sizes


def _check_pieces(
    pieces: Sequence[Piece], size: Size, options: ViewOptions, max_pixels: int | None
) -> None:
    """Raises ValueError for a piece that is empty, lies outside the image, which has `size`, or is
    enlarged to more than twice the pixels that anything here can use."""
    width, height = size
    largest = 2 * max(width * height, max_pixels or 0, MAX_PIXELS)
    for piece in pieces:
        left, top, right, bottom = piece.region
        inside = 0 <= left < right <= width and 0 <= top < bottom <= height
        if not inside or min(piece.size) < 1 or piece.size[0] * piece.size[1] > largest:
            raise ValueError(
                f"the view '{options.title}' gives the region {piece.region} at size {piece.size}"
                f" of an image of {width} x {height} pixels"
            )


def _check_counts(example: Example, options: ViewOptions, given: list[int]) -> None:
    """Raises ValueError if a view returns other numbers of pieces than its `counts`, by which
    markers are put into the question."""
    promised = options.view.counts(example, options)
    if given != promised:
        raise ValueError(
            f"the view '{options.title}' gives {given} pieces of the images, and counts {promised}"
        )


def _cut(image: Image, piece: Piece) -> Image:
    """The pixels of a piece, resized."""
    cut = _region(_edited(image, piece.change), piece.region)
    resized = cut if cut.size == piece.size else cut.resize(piece.size, Resampling.BICUBIC)
    return _edited(resized, piece.after)


def _edited(image: Image, edit: Callable[[Image], Image] | None) -> Image:
    """What `edit` makes of an image. Raises ValueError if it has another size."""
    edited = edit(image) if edit else image
    if edited.size != image.size:
        raise ValueError(f"a view's change makes an image of {edited.size} of one of {image.size}")
    return edited


def _region(image: Image, region: Region) -> Image:
    """The pixels of a region. `Image.crop` is not used, since it refuses large regions."""
    left, top, right, bottom = region
    if region == (0, 0, *image.size):
        return image
    crop = new_image(image.mode, (right - left, bottom - top))
    crop.paste(image, (-left, -top))
    return crop
