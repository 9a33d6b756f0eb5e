"""Writes rows with located evidence as JSON lines, and goes on with a file that an earlier call
left.

A row is our own (docs/data.md), with the located `boxes` in place of other evidence, none if
nothing was found, and `located`: `by` the method, `confidence` in 0..1 with the method's meaning,
`area`, the boxes' share of their picture, `model`, and `row`, the name of the row in the data.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from opd.data.convert import Beside, own_row
from opd.data.images import image_size
from opd.errors import BackendError, DataError
from opd.locate import LOCATORS, Located, Looker, locate
from opd.models.files import read_json
from opd.progress import Progress
from opd.run.files import guarded
from opd.run.recipe import Recipe
from opd.run.session import Opened, open_rows
from opd.run.strict_json import dumps
from opd.types import Box, Example
from opd.views.usable import Skipped, name

DIGITS = 2
"""Digits behind the point of a box in pixels."""


@dataclass(frozen=True)
class Result:
    """What a file holds: `rows`, of which `located` have boxes, and of these the medians of the
    confidence and of the boxes' share of their picture, None if there are none. `skipped` lists the
    rows of this call that could not be used."""

    rows: int
    located: int
    median_confidence: float | None
    median_box_area: float | None
    skipped: list[dict[str, str]]


def locate_rows(
    recipe: Recipe, backend: str, by: str, out: Path, count: int | None, progress: Progress
) -> Result:
    """Locates the evidence of all rows of data.path, or of `count` spread over it, by the method
    `by`, and adds the rows to `out` that it does not hold yet.

    Every slice of rows is on the disk before the next one is located. Raises UserError, before
    weights are loaded where possible, and RunError if the disk is full.
    """
    with _opened(recipe, by, out, progress) as file:
        opened = open_rows(recipe, backend, progress, count)
        looker = _looker(opened)
        rows, skipped = opened.examples, Skipped(progress)
        # A row of the same name with another question is of other data.
        asked = {row["located"]["row"]: row["question"] for row in file.rows}

        def wanted(example: Example) -> bool:
            before = asked.get(name(example))
            if before is not None and before != example.question:
                raise DataError(
                    f"'{out}' holds another row {name(example)}: it was located in other data; take"
                    " another --out"
                )
            return before is None

        progress.begin("locate", len(rows))
        for found in locate(LOCATORS[by], looker, rows, skipped, progress.advance, wanted):
            file.add([_row(*one, by, looker.name, file.beside) for one in found])
    result = _result(file.rows, skipped)
    if not result.rows:
        raise DataError(f"{recipe.data.path}: no row could be used ({skipped.why()})")
    return result


@dataclass
class _File:
    """The rows of `out`, and their pictures `beside` it."""

    out: Path
    handle: BinaryIO
    rows: list[Mapping[str, Any]]
    beside: Beside

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows. Raises RunError if the disk is full."""
        with guarded(self.out):
            self.handle.write("".join(f"{dumps(row)}\n" for row in rows).encode())
            self.handle.flush()
        self.rows += rows


@contextmanager
def _opened(recipe: Recipe, by: str, out: Path, progress: Progress) -> Iterator[_File]:
    """The file `out`, new or as an earlier call left it. Raises DataError for a file of something
    else, of another method or another model, or which another process writes."""
    if out.suffix.lower() != ".jsonl":
        raise DataError(f"'{out}': rows are written as JSON lines; name it {out.stem}.jsonl")
    if out.exists() and not out.is_file():
        raise DataError(f"'{out}' is not a file; take another name")
    data = Path(recipe.data.path)
    if out.exists() and data.exists() and out.samefile(data):
        raise DataError(f"'{out}' is the data itself; take another name for --out")
    with guarded(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = out.open("a+b")
    with handle:
        _lock(handle, out)
        handle.seek(0)
        rows = _read(handle, out, by, recipe.model.path, progress)
        try:
            yield _File(out, handle, rows, Beside(out, copy=False))
        finally:
            if not rows:  # a call that located nothing leaves no empty file
                out.unlink(missing_ok=True)


def _read(
    handle: BinaryIO, out: Path, by: str, model: str, progress: Progress
) -> list[Mapping[str, Any]]:
    """The rows that an earlier call has written; a last line that was not finished is cut off."""
    rows: list[Mapping[str, Any]] = []
    whole = 0
    for number, line in enumerate(handle, 1):
        if not line.endswith(b"\n") and line.startswith(b'{"id"'):
            handle.truncate(whole)
            progress.note(f"{out}:{number}: this line was not finished; its row is located again")
            break
        whole += len(line)
        try:
            row = json.loads(line)
            told = row["located"]
            before, with_model = told["by"], told["model"]
            str(told["row"]), str(row["question"]), float(told["confidence"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(
                f"'{out}' exists, and its line {number} is no row of opd data locate; take another"
                " name for --out"
            ) from None
        if (before, with_model) != (by, model):
            raise DataError(
                f"'{out}' was located by {before} with the model {with_model}, not by {by} with"
                f" {model}; take another name for --out"
            )
        rows.append(row)
    handle.seek(0, 2)
    return rows


def _lock(handle: BinaryIO, out: Path) -> None:
    """Keeps other processes from writing the file. Raises DataError if one does."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"'{out}' is being written by another process") from None
    except OSError:  # a file system without locks
        return


def _looker(opened: Opened) -> Looker:
    """The model of a recipe, as locators get it. Raises UserError."""
    session, recipe = opened.load(), opened.recipe
    if session.backend.size > 1:
        raise BackendError("opd data locate runs in one process; start it without a launcher")
    return Looker(
        recipe.model.path,
        read_json(opened.options.path / "config.json"),
        session.backend,
        session.encoder,
        recipe.view,
        recipe.measure.max_tokens,
        recipe.data.max_prompt_tokens,
        recipe.rollout.sample_tokens,
        recipe.rollout.microbatch_tokens,
    )


def _row(
    example: Example, found: Located, by: str, model: str, beside: Beside
) -> Mapping[str, Any]:
    """The row of an example with the evidence that was found."""
    boxes = tuple(_rounded(box) for box in found.boxes)
    row = own_row(replace(example, boxes=boxes, teacher_images=()), beside)
    located = {
        "by": by,
        "confidence": round(found.confidence, 4),
        "area": round(sum(_area(box, example) for box in boxes), 6),
        "model": model,
        "row": name(example),
    }
    return {**row, "located": located}


def _rounded(box: Box) -> Box:
    return replace(
        box, **{side: round(getattr(box, side), DIGITS) for side in ("x0", "y0", "x1", "y1")}
    )


def _area(box: Box, example: Example) -> float:
    """A box's share of its picture."""
    width, height = image_size(example.images[box.image], example.max_image_pixels)
    return (box.x1 - box.x0) * (box.y1 - box.y0) / (width * height)


def _result(rows: Sequence[Mapping[str, Any]], skipped: Skipped) -> Result:
    located = [row["located"] for row in rows if row.get("boxes")]

    def middle(key: str) -> float | None:
        values = [float(one[key]) for one in located if key in one]
        return median(values) if values else None

    return Result(len(rows), len(located), middle("confidence"), middle("area"), skipped.records())
