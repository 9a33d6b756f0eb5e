"""Prints results as text and tables on stdout, escaped so that they cannot steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from opd_cli.terminal import visible

NARROWEST = 60
"""Smallest width of tables in columns. A narrower console wraps their lines, but shows all of
them."""


class Terminal(Console):
    """A rich console without markup, emoji names and highlighting, which escapes all text."""

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__(file=file, markup=False, emoji=False, highlight=False)
        if file is None and self.width < NARROWEST:
            self.width = NARROWEST

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes a text and puts it on one line, before layout."""
        return super().render_str(self.encodable(visible(text)), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escapes every segment just before it is written; only the layout may break lines."""
        for segment in super().render(renderable, options):
            text = (
                segment.text
                if segment.control
                else self.encodable(visible(segment.text, keep="\n", longest=None))
            )
            yield segment if text == segment.text else Segment(text, segment.style)

    def encodable(self, text: str) -> str:
        """The text with escapes for characters that the console's encoding lacks, so that columns
        stay aligned."""
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)


def cell(text: str, style: str | Style = "") -> Text:
    """Escaped text in a style."""
    return Text(visible(text), style=style)
