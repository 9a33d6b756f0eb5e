"""Formats of rows. The tables below list them; a new format is a file in this folder and a line in
a table.

A program adds a format by `register`, as `examples/06_a_format.py` shows.
"""

from __future__ import annotations

from opd.data.formats.format import FileFormat, Format, Rows, WholeFormat
from opd.data.formats.mapped import Mapped
from opd.data.formats.tree import TREE
from opd.data.formats.vision_opd import CLEAN, PARENT
from opd.data.formats.visual_cot import VISUAL_COT

__all__ = ["FileFormat", "Format", "Mapped", "Rows", "WholeFormat", "register"]

BUILT_IN: list[Format] = [CLEAN, PARENT, VISUAL_COT, TREE]
"""The formats of rows. Rows that none of them matches are read as our own (`opd.data.survey`)."""

NAMED: list[Format] = []
"""Formats that are read if `data.format` names them, and never recognised."""

WHOLE: list[WholeFormat] = []
"""The formats of files that are one JSON object."""

REGISTERED: dict[str, Format | FileFormat] = {}
"""The formats that programs have registered, by name."""


def register(reader: Format | FileFormat) -> None:
    """Makes `reader` read the rows, or the data files, that it recognises, in this process.

    Registered formats are tried before the built-in formats. A second registration of the same
    name replaces the first.
    """
    REGISTERED[reader.name] = reader
