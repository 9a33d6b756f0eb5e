"""Writes the rows of any data as our own JSON lines, from which the same examples are read.

Boxes are in pixels of the upright picture, and paths relative to the file. A picture that is not a
file of its own is written beside it, named by its content, so that converting again changes
nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from opd.data.boxes import Drawn, boxes
from opd.data.embedded import is_embedded
from opd.data.every import EveryRow
from opd.data.images import opened
from opd.data.tally import Tally
from opd.errors import DataError, RunError
from opd.paths import cache_folder, read_file
from opd.progress import Progress
from opd.types import Box, Example, ImageSource

SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "JPEG2000": ".jp2",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "HEIF": ".heic",
}
"""Suffixes of files by Pillow's name of their format; ".png" for PNG, and so on, of any other."""

NAMED = 32
"""Letters of the SHA-256 by which a picture is named, which are 128 bits."""


@dataclass(frozen=True)
class Converted:
    """What was written: of `rows`, as many as `written`, and the number of `pictures` beside them;
    `left_out`: the others by kind."""

    rows: int
    written: int
    pictures: int
    left_out: dict[str, dict[str, Any]]


def check_free(out: Path, force: bool) -> None:
    """Raises DataError if `out` cannot be written, or holds what `convert` has not written; with
    `force` it may be replaced."""
    if out.suffix.lower() != ".jsonl":
        raise DataError(f"'{out}': rows are written as JSON lines; name it {out.stem}.jsonl")
    if out.exists() and not out.is_file():
        raise DataError(f"'{out}' is not a file; take another name")
    if out.exists() and not force and _digest(out) not in _written(out):
        raise DataError(
            f"'{out}' exists, and opd data convert has not written it, or it was changed since;"
            " take another name, or replace it with --force"
        )


def convert(
    rows: EveryRow, out: Path, progress: Progress, copy: bool = False, force: bool = False
) -> Converted:
    """Writes all usable rows into `out`, and returns what was written.

    With `copy`, all pictures are written beside it, not only those that are no files. If no row is
    usable, `out` stays as it was. Raises DataError as `check_free` does, and RunError if the disk
    is full.
    """
    check_free(out, force)
    left_out, written = Tally(), 0
    beside = Beside(out, copy)
    temporary = out.with_name(f"{out.name}.{uuid4().hex[:8]}.partial")
    digest = hashlib.sha256()
    with _guarded(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                progress.begin("convert", len(rows))
                for place, line in enumerate(rows.each(partial(_line, rows, beside))):
                    progress.advance(1)
                    if isinstance(line, DataError):
                        left_out.add(line.kind, rows.source(place), str(line))
                        continue
                    digest.update(line)
                    file.write(line)
                    written += 1
            if written and not (out.exists() and _digest(out) == digest.hexdigest()):
                # Both contents are ours while one takes the place of the other.
                known = [*_written(out)[-1:], digest.hexdigest()]
                _replace(_marker(out), "".join(f"{each}\n" for each in known).encode())
                os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return Converted(len(rows), written, beside.pictures, left_out.result())


class Beside:
    """The pictures of the file `out`: paths of files relative to it, and copies in a folder beside
    it. Safe for threads. `copy`: files are copied too."""

    def __init__(self, out: Path, copy: bool) -> None:
        self.folder = out.with_name(f"{out.stem}-images")
        self._root = _absolute(out.parent)
        self._copy = copy
        self._names: set[str] = set()

    @property
    def pictures(self) -> int:
        """Number of pictures in the folder that the rows name."""
        return len(self._names)

    def path(self, source: ImageSource) -> str:
        """The path of a picture for a row. Raises DataError if the picture cannot be read."""
        if isinstance(source, Path) and not self._copy and not _is_cached(source):
            text = _relative(source, self._root)
            if not any("\ud800" <= letter <= "\udfff" for letter in text):
                return text  # else the name is not UTF-8, which a file in JSON is
        content, suffix = encoded(source)
        name = hashlib.sha256(content).hexdigest()[:NAMED] + suffix
        path = self.folder / name
        if name not in self._names:
            self.folder.mkdir(exist_ok=True)
            if not (path.is_file() and path.read_bytes() == content):
                _replace(path, content)
            self._names.add(name)
        return f"{self.folder.name}/{name}"


def encoded(source: ImageSource) -> tuple[bytes, str]:
    """The content of an encoded picture, as PNG of one in memory, and the suffix of its format.
    Raises DataError if the picture cannot be read."""
    if isinstance(source, Image.Image):
        content = BytesIO()
        source.save(content, "PNG")
        return content.getvalue(), ".png"
    with opened(source) as image:
        kind = image.format or ""
    try:
        content_bytes = read_file(source) if isinstance(source, Path) else source.read()
    except OSError as error:
        raise DataError(f"image cannot be read: {source}: {error.strerror}") from error
    return content_bytes, SUFFIXES.get(kind, f".{kind.lower()}")


def own_row(example: Example, beside: Beside) -> dict[str, Any]:
    """An example as a row of our own. Raises DataError if a picture cannot be read."""
    row: dict[str, Any] = {"id": example.id}
    for field, images in (("image", example.images), ("teacher_image", example.teacher_images)):
        paths = [beside.path(source) for source in images]
        if len(paths) == 1:
            row[field] = paths[0]
        elif paths:
            row[f"{field}s"] = paths
    row["question"] = example.question
    if example.boxes:
        row["boxes"] = [_box(box) for box in example.boxes]
    if example.teacher_question is not None:
        row["teacher_question"] = example.teacher_question
    if example.answer is not None:
        answer = example.answer
        row["answer"] = answer if isinstance(answer, str) else list(answer)
    if example.choices:
        row["choices"] = list(example.choices)
    if example.weight != 1:
        row["weight"] = example.weight
    return row


def _line(rows: EveryRow, beside: Beside, place: int, example: Example) -> bytes:
    """The line of a row. Raises DataError for a row that would not be read as the same example."""
    row = own_row(example, beside)
    sizes = [rows.size(source) for source in example.images]
    if boxes(row, sizes, Drawn()) != example.boxes:
        raise DataError("field 'boxes': in pixels, the boxes are not the same ones")
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _box(box: Box) -> Any:
    corners = [_number(corner) for corner in (box.x0, box.y0, box.x1, box.y1)]
    return {"image": box.image, "box": corners} if box.image else corners


def _is_cached(path: Path) -> bool:
    """Whether a file is a download, or unpacked from an archive: a person may remove it any
    time."""
    return path.is_relative_to(cache_folder())


def _number(value: float) -> float:
    """A number without ".0"."""
    return int(value) if value == int(value) else value


def _relative(path: Path, root: Path) -> str:
    """A path as it is read in a file of the absolute folder `root`."""
    full = _absolute(path.parent) / path.name
    # `..` of a linked folder is that of the folder it leads to.
    real = Path(os.path.realpath(full.parent)) / full.name
    within = full.is_relative_to(root)
    text = os.path.relpath(full, root) if within else os.path.relpath(real, os.path.realpath(root))
    plain = text.strip() and not text.startswith("~") and not is_embedded(text)
    return text if plain else f"./{text}"


def _absolute(folder: Path) -> Path:
    """The absolute path of a folder, with its links unless `..` stands in it."""
    return Path(os.path.realpath(folder) if ".." in folder.parts else os.path.abspath(folder))


def _marker(out: Path) -> Path:
    """The file beside `out` that says what was written there."""
    return out.with_name(f".{out.name}.opd-converted")


def _written(out: Path) -> Sequence[str]:
    """SHA-256, in hexadecimal, of what `convert` has written into `out`; oldest first."""
    try:
        return _marker(out).read_text("ascii").split()
    except (OSError, ValueError):
        return []


def _digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _replace(path: Path, content: bytes) -> None:
    """Writes a file as a whole. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _guarded(out: Path) -> Iterator[None]:
    """Turns an OSError, such as a full disk, into a RunError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"'{out}' cannot be written: {reason}; what was there before stays"
        ) from error
