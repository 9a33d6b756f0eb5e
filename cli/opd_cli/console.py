"""Results as text and tables on stdout: nothing in them steers the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from opd_cli.terminal import visible

NARROWEST = 60
"""Columns that tables have at least: a narrower console breaks their lines, but nothing is left
out."""


class Terminal(Console):
    """A console to which text is text: no markup, no emoji names, no highlighting, and every
    character visible."""

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__(file=file, markup=False, emoji=False, highlight=False)
        if file is None and self.width < NARROWEST:
            self.width = NARROWEST

    def render_str(self, text: str, **options: Any) -> Text:
        """Text on one line, before it is laid out."""
        return super().render_str(self.encodable(visible(text)), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The last look at what is about to be written, whoever made it; only layout breaks
        lines."""
        for segment in super().render(renderable, options):
            text = (
                segment.text
                if segment.control
                else self.encodable(visible(segment.text, keep="\n", longest=None))
            )
            yield segment if text == segment.text else Segment(text, segment.style)

    def encodable(self, text: str) -> str:
        """The text with escapes for the characters that the console lacks, so that columns stay
        straight."""
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)


def cell(text: str, style: str | Style = "") -> Text:
    """Text of the data in a style."""
    return Text(visible(text), style=style)
