"""Reads examples from data files.

A fault of a row (image unreadable, box outside, field missing, malformed JSON) skips the row and
counts it; with `strict`, or if no row is left, it raises DataError. A fault of the whole file
always raises DataError. The message is one line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from opd.data.dataset import Dataset, Reader, ReadRow, gather, spread
from opd.data.formats.choice import rows_of
from opd.data.formats.own import Said, read_row
from opd.data.images import image_size
from opd.data.picture_store import ImageFacts
from opd.data.pictures import Pictures
from opd.data.reading import AS_IT_IS, Reading
from opd.data.remarks import Remarks
from opd.data.sources import Sources
from opd.data.tables.hub import is_id
from opd.errors import DataError
from opd.paths import PathText
from opd.progress import Progress, Quiet
from opd.types import MAX_IMAGE_PIXELS, EncodedImage, Example

__all__ = ["DataOptions", "Dataset", "Reading", "open_data", "open_rows", "read_dataset", "spread"]


class DataOptions(Reading):
    """The data that are trained on, and which rows are accepted."""

    path: PathText = Field(
        "tiny", min_length=1, description="A data file, or 'tiny' for the embedded task."
    )
    max_prompt_tokens: int = Field(
        8192,
        ge=1,
        description="Rows with a longer prompt, student's or teacher's, are skipped and counted.",
    )
    strict: bool = Field(
        False, description="A faulty row ends the run instead of being skipped and counted."
    )
    max_image_pixels: int = Field(
        MAX_IMAGE_PIXELS,
        ge=1,
        description=(
            "Larger pictures are refused: a small file can hold a picture that fills the memory."
        ),
    )


def open_data(
    path: str,
    strict: bool = False,
    labelled: bool = True,
    progress: Progress | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    count: int | None = None,
    *,
    evidence: bool = True,
    reading: Reading = AS_IT_IS,
) -> Sequence[Example]:
    """The examples of a data file, or, for "tiny", 12,800 scenes of the embedded task. If not
    `labelled`, the answers are removed. `reading` says what the file does not say itself.

    With `evidence`, a row without boxes and teacher's images is faulty; without, it is read.

    With `count`, at most so many examples, spread evenly over the file; only the images of rows
    that are tried for it are read.
    Raises DataError if the file cannot be used, and with `strict` for the first faulty row.
    """
    if path == "tiny":
        from opd.tiny import Scenes

        scenes = Scenes("train", 12800, labelled=labelled)
        return scenes if count is None else spread(scenes, count)
    dataset = read_dataset(
        Path(path).expanduser(),
        strict,
        progress,
        max_image_pixels,
        count,
        evidence=evidence,
        reading=reading,
    )
    return dataset if labelled else dataset.without_answers()


def read_dataset(
    path: Path,
    strict: bool = False,
    progress: Progress | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    count: int | None = None,
    *,
    evidence: bool = True,
    reading: Reading = AS_IT_IS,
) -> Dataset:
    """Reads a file in the format that its rows show; arguments and errors as in `open_data`.

    Every image is fully decoded once, to find damaged images, and then dropped. A store beside the
    file records sizes and hashes of the images, so that the next run need not decode them
    (`opd.data.pictures`).
    """
    progress = progress or Quiet()
    reader, remarks = open_rows(path, progress, max_image_pixels, evidence, reading)
    dataset = gather(reader, strict, progress, count)
    dataset.notes += remarks.notes()
    return dataset


def open_rows(
    path: Path,
    progress: Progress,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    evidence: bool = True,
    reading: Reading = AS_IT_IS,
) -> tuple[Reader, Remarks]:
    """Opens a file, whose rows are then read one by one; arguments and errors as in `open_data`.
    The second result counts what a person should know about the rows that are read."""
    rows = rows_of(path, reading, progress)
    pictures, remarks = Pictures(max_image_pixels, rows.store or path), Remarks()
    images = Path(reading.images) if reading.images else rows.images
    sources = Sources(
        rows.folder or path.parent, images, reading.allow_download, progress, pictures.stop
    )

    def row_with(
        facts: Callable[[EncodedImage], ImageFacts], remark: Callable[[str], None]
    ) -> ReadRow:
        return partial(
            read_row,
            sources=sources,
            box_format=rows.box_format,
            facts=facts,
            max_image_pixels=max_image_pixels,
            said=Said(reading.box_format, reading.box_image, reading.question),
            names=rows.names,
            remark=remark,
            evidence=evidence,
        )

    # The images of later rows are decoded when the row is encoded, which finds damaged ones.
    later = row_with(partial(_header, max_image_pixels=max_image_pixels), _unheard)
    return Reader(rows, row_with(pictures, remarks.add), later, pictures), remarks


def _header(source: EncodedImage, max_image_pixels: int) -> ImageFacts:
    """What the header of an image says; or the fault."""
    try:
        return ImageFacts(image_size(source, max_image_pixels), b"")
    except DataError as error:
        return ImageFacts((0, 0), b"", str(error))


def may_exist(path: str) -> bool:
    """Whether `path` is a file or folder, or may be the id of a Hugging Face data set."""
    return os.path.exists(path) or is_id(path)


def _unheard(_: str) -> None:
    """Takes a remark about a row that is read while the run goes on."""
