"""Writes a sheet as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from opd.sheet.cards import (
    Card,
    Shown,
    caption,
    details,
    factor_for,
    printable,
    scaled,
    sequence,
)

EXACT_PIXELS = 1 << 19
"""A picture of at most this many pixels is kept as it is, in PNG."""

LARGEST = (1280, 1280)
"""Width and height to which a larger picture is scaled down, in JPEG."""

STUDENT, TEACHER = (640, 480), (400, 480)
"""Largest width and height on the page, in CSS pixels."""

MARK = "opd data show"
"""Names the program in the file, so that a sheet is known as one."""

STYLE = """
:root { color-scheme: light dark; --faint: #d1d9e0; --grey: #59636e; --red: #d1242f; }
@media (prefers-color-scheme: dark) {
  :root { --faint: #3d444d; --grey: #9198a1; --red: #f85149; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 20px; overflow-wrap: anywhere; }
article { border-top: 1px solid var(--faint); padding: 16px 0; }
h2 { font-size: 16px; margin: 0; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; margin: 12px 0; }
figure { margin: 0; max-width: 100%; }
svg { display: block; max-width: 100%; height: auto; }
.small { image-rendering: pixelated; }
rect { fill: none; stroke: #ff0000; stroke-width: 3px; vector-effect: non-scaling-stroke; }
rect.halo { stroke: #ffffff; stroke-width: 7px; }
figcaption, .grey { color: var(--grey); font-size: 14px; }
figcaption { max-width: 400px; }
p { margin: 8px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.fault { color: var(--red); }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{mark}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{cards}
</body>
</html>
"""


def sheet(title: str, rows: Iterable[Card]) -> bytes:
    """The sheet as an HTML file in UTF-8."""
    page = PAGE.format(
        mark=MARK,
        digest=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
        title=_text(title),
        style=STYLE,
        cards="\n".join(map(_article, rows)),
    )
    return page.encode()


def is_sheet(path: Path) -> bool:
    """Whether a file is a sheet that was written here."""
    try:
        with path.open("rb") as file:
            return f'content="{MARK}"'.encode() in file.read(512)
    except OSError:
        return False


def _article(card: Card) -> str:
    parts = [f'<h2 dir="auto">{_text(card.id)}</h2>']
    about = " \u00b7 ".join(part for part in (card.source, details(card)) if part)
    if about:
        parts.append(f'<p class="grey">{_text(about)}</p>')
    if card.fault:
        parts.append(f'<p class="fault">cannot be used: {_text(card.fault)}</p>')
    if figures := "\n".join(map(_figure, sequence(card))):
        parts.append(f'<div class="pictures">\n{figures}\n</div>')
    parts.append(f'<p dir="auto">{_text(card.question)}</p>')
    if card.teacher_question:
        parts.append('<p class="grey">The teacher is asked:</p>')
        parts.append(f'<p dir="auto">{_text(card.teacher_question)}</p>')
    if card.answer:
        parts.append(f'<p class="grey">Answer: <bdi>{_text(card.answer)}</bdi></p>')
    return "<article>\n{}\n</article>".format("\n".join(parts))


def _figure(shown: Shown) -> str:
    """A picture with its boxes and a caption. The boxes are drawn over the picture, whose pixels
    stay as they are."""
    most = STUDENT if shown.title.startswith("student") else TEACHER
    width, height = shown.image.size
    factor = factor_for(shown.image.size, most)
    across, down = scaled(shown.image.size, factor)
    boxes = "".join(
        f'<rect{line} x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"/>'
        for x0, y0, x1, y1 in shown.boxes
        for line in (' class="halo"', "")
    )
    small = ' class="small"' if factor >= 1 else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{across}" height="{down}"'
        f' role="img" aria-label="{_text(shown.title)}">'
        f'<image{small} width="{width}" height="{height}" href="{_uri(shown.image)}"/>{boxes}</svg>'
        f"<figcaption>{_text(caption(shown, factor))}</figcaption></figure>"
    )


def _uri(image: Image.Image) -> str:
    """A picture as a data URI: exact if it is small."""
    content, kind = BytesIO(), "png"
    if image.width * image.height <= EXACT_PIXELS:
        image.save(content, "PNG")
    else:
        kind = "jpeg"
        smaller = image.copy()
        smaller.thumbnail(LARGEST, Image.Resampling.LANCZOS)
        smaller.save(content, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _text(text: str) -> str:
    """A text of the data, escaped."""
    return escape(printable(text))
