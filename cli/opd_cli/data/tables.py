"""Tables that the commands of `opd data` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from opd_cli.console import cell


def kinds(title: str, rows: Mapping[str, Mapping[str, Any]], named: bool) -> Table:
    """Defects or warnings: number of rows, kind if `named`, and the first row of each kind."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column(title, overflow="fold")
    for kind, found in rows.items():
        first = cell(found["first"][0], "bright_black" if named else "")
        table.add_row(f"{found['count']:,}", kind if named else first)
        if named:
            table.add_row("", first)
    return table
