"""COCO's annotations, and other detection data in the same form: one JSON object.

    images       [{"id", "file_name", "width", "height"}, ...]
    categories   [{"id", "name"}, ...]
    annotations  [{"id", "image_id", "category_id", "bbox", "iscrowd"}, ...]

A box is [left, top, width, height] in pixels. Every annotation becomes a row with the category's
name as the answer. The rows have no question: `data.question` says it, such as "What is in the
region?". The region of a crowd (`iscrowd`) holds several objects, so its row is faulty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opd.data.boxes import BoxFormat
from opd.data.fields import Row, cut, show
from opd.data.formats.mapped import stated_size
from opd.errors import DataError


@dataclass(frozen=True)
class Coco:
    """Reads the annotations of COCO (`opd.data.formats.format.WholeFormat`)."""

    name: str = "COCO's annotations"
    key: str = "coco"
    box_format: BoxFormat = "pixels-xywh"
    names: Mapping[str, str] = field(
        default_factory=lambda: {
            "image": "file_name",
            "boxes": "bbox",
            "answer": "category_id",
            "box_size": "width, height",
        }
    )

    def matches(self, whole: Row) -> bool:
        """Whether a JSON object holds images and annotations."""
        return all(isinstance(whole.get(name), list) for name in ("images", "annotations"))

    def to_rows(self, whole: Row) -> list[Row]:
        """A row in our fields for each annotation; one that cannot be used holds its `fault`.
        Raises DataError for an object that is not COCO's."""
        images, categories = _by_id(whole, "images"), _by_id(whole, "categories")
        annotations = whole.get("annotations")
        if not isinstance(annotations, list):
            raise DataError("field 'annotations' is missing: a list of objects with bbox")
        rows: list[Row] = []
        for annotation in annotations:
            try:
                rows.append(_row(annotation, images, categories))
            except DataError as error:
                rows.append({"fault": error})
        return rows


def _by_id(whole: Row, name: str) -> dict[Any, Row]:
    """The entries of a list by their ids. Raises DataError."""
    entries = whole.get(name)
    if entries is None and name == "categories":
        return {}
    if not isinstance(entries, list):
        raise DataError(f"field '{name}' is missing: a list of objects with id")
    return {
        entry["id"]: entry
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), int | str)
    }


def _row(annotation: Any, images: dict[Any, Row], categories: dict[Any, Row]) -> Row:
    """The row of an annotation. Raises DataError."""
    if not isinstance(annotation, dict):
        raise DataError(f"an annotation is an object, but this is {show(annotation)}")
    if annotation.get("iscrowd"):
        raise DataError("a crowd (iscrowd) is not one object, and its region is not evidence")
    image = _joined(annotation, "image_id", images)
    category = _joined(annotation, "category_id", categories) if categories else {}
    return {
        "id": annotation.get("id"),
        "image": image.get("file_name"),
        "boxes": annotation.get("bbox"),
        "box_size": stated_size(image),
        "answer": category.get("name"),
    }


def _joined(annotation: Row, field: str, entries: dict[Any, Row]) -> Row:
    """The entry that an annotation refers to. Raises DataError."""
    key = annotation.get(field)
    if not isinstance(key, int | str) or key not in entries:
        raise DataError(f"field '{field}': {cut(show(key))} is the id of no entry")
    return entries[key]


COCO = Coco()
