"""Draws a sheet with Pillow, at twice the size of a page on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from opd.errors import plural
from opd.sheet.cards import (
    Card,
    Corners,
    Shown,
    caption,
    details,
    factor_for,
    printable,
    scaled,
    sequence,
)
from opd.sheet.fonts import MISSING, Fonts

WIDTH = 1600
"""Pixels of the sheet from left to right."""

MARGIN, GAP = 40, 24
STUDENT, TEACHER = (860, 640), (620, 640)
"""Largest width and height of a picture of the student and of the teacher."""

CAPTION = 460
"""Width of a caption below a narrower picture."""

TEXT, SMALL, HEAD = 28, 22, 34
"""Sizes of letters in pixels."""

LINES = 24
"""Largest number of lines of a question."""

INK, GREY, FAINT, PAPER, RED = "#1b1f24", "#59636e", "#d1d9e0", "#ffffff", "#ff0000"

FRAME, HALO = 4, 2
"""Widths of the red line around evidence, which stands outside of the box, and of a white line
around that, so that it is seen on red."""

MARK = "opd data show"
"""Written into the file, so that a sheet is known as one."""


class Canvas:
    """Draws from the top down. `height` is where the next thing stands."""

    def __init__(self) -> None:
        self.height = MARGIN
        self.fonts = {size: Fonts(size) for size in (TEXT, SMALL, HEAD)}
        self._drawn: list[tuple[int, int, Image.Image]] = []

    def text(self, text: str, size: int = TEXT, ink: str = INK, most: int = LINES) -> None:
        """Draws a text over the whole width, and at most so many lines of it."""
        lines = self.fonts[size].wrapped(printable(text), WIDTH - 2 * MARGIN)
        left = len(lines) - most
        if left > 0:
            lines = [*lines[:most], f"... ({plural(left, 'more line')})"]
        for line in lines:
            self.line(line, MARGIN, self.height, size, ink)
            self.height += round(1.4 * size)

    def line(self, text: str, left: int, top: int, size: int, ink: str) -> None:
        """Draws one line."""
        fonts = self.fonts[size]
        width = min(WIDTH - left, round(fonts.width(text)) + 2)
        if width <= 2:
            return
        strip = Image.new("RGB", (width, round(1.4 * size)), PAPER)
        draw, x = ImageDraw.Draw(strip), 0.0
        for font, part in fonts.runs(text):
            # Words of Arabic or Hebrew run to the left in a line that runs to the right.
            shaped = font.layout_engine == ImageFont.Layout.RAQM
            direction = "ltr" if shaped else None
            draw.text((x, 1.05 * size), part, ink, font, "ls", direction=direction)
            x += font.getlength(part)
        self.paste(strip, left, top)

    def paste(self, image: Image.Image, left: int, top: int) -> None:
        """Puts an image onto the sheet."""
        self._drawn.append((left, top, image))

    def rule(self) -> None:
        """Draws a line from left to right."""
        self.paste(Image.new("RGB", (WIDTH - 2 * MARGIN, 2), FAINT), MARGIN, self.height)
        self.height += 2 + GAP

    def missing(self) -> set[str]:
        """The characters that no font has."""
        return set().union(*(fonts.missing for fonts in self.fonts.values()))

    def image(self) -> Image.Image:
        """The whole sheet."""
        sheet = Image.new("RGB", (WIDTH, self.height + MARGIN), PAPER)
        for left, top, image in self._drawn:
            sheet.paste(image, (left, top))
        return sheet


def sheet(title: str, rows: Iterable[Card]) -> bytes:
    """The sheet as a PNG file."""
    canvas = Canvas()
    canvas.text(title, HEAD, most=2)
    canvas.height += GAP // 2
    for card in rows:
        canvas.rule()
        _draw(canvas, card)
    missing = canvas.missing()
    if missing:
        canvas.rule()
        what = plural(len(missing), "different character")
        canvas.text(
            f"{MISSING}: no font of this machine has {what} of the texts; a sheet named .html"
            " shows them",
            SMALL,
            GREY,
        )
    content, about = BytesIO(), PngInfo()
    about.add_text("Software", MARK)
    canvas.image().save(content, "PNG", pnginfo=about)
    return content.getvalue()


def is_sheet(path: Path) -> bool:
    """Whether a file is a sheet that was drawn here."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except (OSError, UnidentifiedImageError, ValueError):
        return False


def _draw(canvas: Canvas, card: Card) -> None:
    """Draws a card."""
    canvas.text(card.id, TEXT, most=2)
    about = "   ".join(part for part in (card.source, details(card)) if part)
    if about:
        canvas.text(about, SMALL, GREY, most=2)
    if card.fault:
        canvas.text(f"cannot be used: {card.fault}", TEXT, RED, most=6)
    canvas.height += GAP // 2
    _draw_pictures(canvas, sequence(card))
    canvas.text(card.question)
    if card.teacher_question:
        canvas.height += GAP // 2
        canvas.text(f"The teacher is asked: {card.teacher_question}", ink=GREY)
    if card.answer:
        canvas.height += GAP // 2
        canvas.text(f"Answer: {card.answer}", ink=GREY, most=6)
    canvas.height += GAP


def _draw_pictures(canvas: Canvas, pictures: Sequence[Shown]) -> None:
    """Draws pictures beside one another, in as many rows as they need."""
    left, lowest = MARGIN, 0
    for shown in pictures:
        most = STUDENT if shown.title.startswith("student") else TEACHER
        factor = factor_for(shown.image.size, most)
        image = drawn(shown, factor)
        lines = canvas.fonts[SMALL].wrapped(caption(shown, factor), max(image.width, CAPTION))
        width = max(image.width, *(round(canvas.fonts[SMALL].width(line)) for line in lines))
        if left > MARGIN and left + width > WIDTH - MARGIN:
            canvas.height += lowest + GAP
            left, lowest = MARGIN, 0
        canvas.paste(image, left, canvas.height)
        below = canvas.height + image.height + 6
        for line in lines:
            canvas.line(line, left, below, SMALL, GREY)
            below += round(1.4 * SMALL)
        left, lowest = left + width + GAP, max(lowest, below - canvas.height)
    canvas.height += lowest + (GAP // 2 if pictures else 0)


def drawn(shown: Shown, factor: float) -> Image.Image:
    """A picture `factor` times as large, with a frame around each box."""
    size = scaled(shown.image.size, factor)
    way = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    image = shown.image.copy() if factor == 1 else shown.image.resize(size, way)
    draw = ImageDraw.Draw(image)
    for corners in shown.boxes:
        draw.rectangle(_frame(corners, factor, FRAME + HALO), outline=PAPER, width=HALO)
        draw.rectangle(_frame(corners, factor, FRAME), outline=RED, width=FRAME)
    return image


def _frame(corners: Corners, factor: float, width: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a frame of this width around a box, the last two inclusive;
    the box itself stays free."""
    x0, y0, x1, y1 = (round(corner * factor) for corner in corners)
    return x0 - width, y0 - width, max(x1, x0 + 1) + width - 1, max(y1, y0 + 1) + width - 1
