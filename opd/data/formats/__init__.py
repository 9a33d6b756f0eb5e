"""Formats of rows. The tables below list them; a new format is a file in this folder and a line in
a table.

A program adds a format by `register`, as `examples/06_a_format.py` shows.
"""

from __future__ import annotations

from opd.data.formats.coco import COCO
from opd.data.formats.format import FileFormat, Format, Rows, WholeFormat
from opd.data.formats.llava import CONVERTED, LLAVA
from opd.data.formats.mapped import Mapped
from opd.data.formats.messages import BLOCKS, OPENAI, PROMPTS
from opd.data.formats.suites import CV_BENCH, HR_BENCH, MME_ORIGINAL, MME_REAL_WORLD, ZOOM_BENCH
from opd.data.formats.swift import QUERIES, SWIFT
from opd.data.formats.tree import TREE
from opd.data.formats.v_star import V_STAR, V_STAR_TABLE
from opd.data.formats.v_zero import V_ZERO
from opd.data.formats.vision_opd import CLEAN, PAPER, PARENT, PARQUET
from opd.data.formats.visual_cot import VISUAL_COT

__all__ = ["FileFormat", "Format", "Mapped", "Rows", "WholeFormat", "register"]

BUILT_IN: list[Format] = [
    CLEAN,
    PARENT,
    PARQUET,
    V_ZERO,
    VISUAL_COT,
    CONVERTED,
    TREE,
    SWIFT,
    QUERIES,
    OPENAI,
    BLOCKS,
    LLAVA,
    V_STAR,
    V_STAR_TABLE,
    HR_BENCH,
    MME_REAL_WORLD,
    MME_ORIGINAL,
    ZOOM_BENCH,
    CV_BENCH,
    PROMPTS,
]
"""The formats of rows. Rows that none of them matches are read as our own (`opd.data.survey`)."""

NAMED: list[Format] = [PAPER]
"""Formats that are read if `data.format` names them, and never recognised."""

WHOLE: list[WholeFormat] = [COCO]
"""The formats of files that are one JSON object."""

REGISTERED: dict[str, Format | FileFormat] = {}
"""The formats that programs have registered, by name."""


def register(reader: Format | FileFormat) -> None:
    """Makes `reader` read the rows, or the data files, that it recognises, in this process.

    Registered formats are tried before the built-in formats. A second registration of the same
    name replaces the first.
    """
    REGISTERED[reader.name] = reader
