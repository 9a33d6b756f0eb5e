"""Formats of data files. The table below lists them in the order in which they are tried; a new
format is a file in this folder and a line in the table.

A program adds a format by `register`, as `examples/06_a_format.py` shows.
"""

from __future__ import annotations

from pathlib import Path

from opd.data.formats.format import Format, Rows
from opd.data.formats.own import Own
from opd.data.formats.tree import TREE
from opd.data.formats.vision_opd import CLEAN, PARENT
from opd.data.formats.visual_cot import VISUAL_COT
from opd.paths import read_start

__all__ = ["Format", "Rows", "recognised", "register"]

START = 65_536
"""Number of bytes at the beginning of a file that `Format.recognise` gets."""

BUILT_IN: list[Format] = [CLEAN, PARENT, VISUAL_COT, TREE, Own()]
"""The formats of opd. The last one reads every file that no other format recognises."""

REGISTERED: dict[str, Format] = {}
"""The formats that programs have registered, by name."""


def register(reader: Format) -> None:
    """Makes `reader` read every data file that it recognises, in this process.

    Registered formats are tried before the built-in formats. A second registration of the same
    name replaces the first.
    """
    REGISTERED[reader.name] = reader


def recognised(path: Path) -> Format:
    """The first format that recognises a file or folder, else our own format."""
    *others, last = [*REGISTERED.values(), *BUILT_IN]
    if not others:
        return last
    start = read_start(path, START)
    return next((reader for reader in others if reader.recognise(path, start)), last)
