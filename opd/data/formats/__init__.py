"""Formats of data files. The table below holds them in the order in which they are asked; a new one
is a file here and a line there.

A program adds its own by `register`, as `examples/06_a_format.py` shows.
"""

from __future__ import annotations

from pathlib import Path

from opd.data.formats.format import Format, Rows
from opd.data.formats.own import Own
from opd.paths import read_start

__all__ = ["Format", "Rows", "recognised", "register"]

START = 65_536
"""Bytes at the beginning of a file by which it is recognised."""

BUILT_IN: list[Format] = [Own()]
"""The last one reads what no other recognises, and says what is wrong with it."""

REGISTERED: dict[str, Format] = {}


def register(reader: Format) -> None:
    """Lets every data file that `reader` recognises be read by it, in this process.

    It is asked before the built-in formats; an earlier one of the same name is replaced.
    """
    REGISTERED[reader.name] = reader


def recognised(path: Path) -> Format:
    """The format of a file or folder: the first that recognises it, else our own."""
    *others, last = [*REGISTERED.values(), *BUILT_IN]
    if not others:
        return last
    start = read_start(path, START)
    return next((one for one in others if one.recognise(path, start)), last)
