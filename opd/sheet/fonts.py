"""Finds a font for every character of a sheet.

Pillow's own font has Latin letters, and is the same on every machine. For other characters the
fonts of the machine are searched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont

FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)

PREFERRED = ("DejaVuSans.", "NotoSans-", "Arial Unicode", "NotoSansCJK", "PingFang", "wqy")
"""Parts of names of fonts that are tried before others."""

TRIED = 300
"""Largest number of fonts that are opened in the search for a character."""

MISSING = "\u25a1"
"""Stands for a character that no font has: a white square."""

NOWHERE = "\U0010fffd"
"""A character that no font has; its glyph is what a font shows for all that it lacks."""


class Fonts:
    """The fonts of one `size`, in pixels. `missing` collects the characters that no font has."""

    def __init__(self, size: int) -> None:
        own = ImageFont.load_default(size)
        if not isinstance(own, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType, and draws no text")
        self.size, self.own = size, own
        self.missing: set[str] = set()
        self._known: dict[str, ImageFont.FreeTypeFont | None] = {}

    def runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Yields parts of a line, each with the font that has all of its characters."""
        part, font = "", self.own
        for letter in text:
            found = self._font(letter, font)
            if found is None:
                self.missing.add(letter)
                letter, found = MISSING, self._font(MISSING, font) or self.own
            if found is not font and part:
                yield font, part
                part = ""
            part, font = part + letter, found
        if part:
            yield font, part

    def width(self, text: str) -> float:
        """The width of a line in pixels."""
        return sum(font.getlength(part) for font, part in self.runs(text))

    def wrapped(self, text: str, width: float) -> list[str]:
        """The lines of a text, broken between words; a word that is longer than a line is broken
        inside, as texts without spaces are."""
        lines: list[str] = []
        for paragraph in text.split("\n"):
            line = ""
            for word in paragraph.split(" "):
                longer = f"{line} {word}" if line else word
                if self.width(longer) <= width:
                    line = longer
                    continue
                if line:
                    lines.append(line)
                *whole, line = self._broken(word, width)
                lines += whole
            lines.append(line)
        return lines

    def _broken(self, word: str, width: float) -> list[str]:
        """A word in parts that fit a line."""
        parts, part = [], ""
        for letter in word:
            if part and self.width(part + letter) > width:
                parts.append(part)
                part = ""
            part += letter
        return [*parts, part]

    def _font(self, letter: str, current: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont | None:
        """The font of a character: the current one if it has the character; None if none has."""
        if letter in " \u200c\u200d":  # no change of font within a phrase
            return current
        if letter not in self._known:
            self._known[letter] = next(
                (font for font in self._candidates() if _has(font, letter)), None
            )
        return self._known[letter]

    def _candidates(self) -> Iterator[ImageFont.FreeTypeFont]:
        yield self.own
        for path in _files():
            font = _opened(path, self.size)
            if font is not None:
                yield font


@cache
def _files() -> list[Path]:
    """The fonts of the machine, at most TRIED, the preferred ones first."""
    found = [
        Path(folder, name)
        for root in FOLDERS
        for folder, _, names in os.walk(os.path.expanduser(root))
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc"))
    ]

    def rank(path: Path) -> tuple[int, int, str]:
        places = [place for place, part in enumerate(PREFERRED) if part in path.name]
        return min(places, default=len(PREFERRED)), "Regular" not in path.name, path.name

    return sorted(found, key=rank)[:TRIED]


@cache
def _opened(path: Path, size: int) -> ImageFont.FreeTypeFont | None:
    """The font in a file; None if it cannot be read."""
    try:
        return ImageFont.truetype(path, size)
    except (OSError, ValueError):
        return None


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a character."""
    try:
        glyph, nothing = (font.getmask(each) for each in (letter, NOWHERE))
    except OSError:  # a font of bitmaps in other sizes
        return False
    return glyph.size != nothing.size or bytes(glyph) != bytes(nothing)
