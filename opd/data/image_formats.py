"""Recognises pictures that Pillow alone cannot open, and loads the plugins that can."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from PIL import Image

HEAD = 512
"""Number of bytes at the beginning of a picture by which its format is recognised."""

BRANDS = {
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
    ),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
"""Brands of ISO media files, which follow "ftyp", and the image formats that they name."""

SIGNATURES = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"%PDF", "PDF"),
    (b"version https://git-lfs", "LFS"),
)

PLUGINS = {
    "HEIC": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    "AVIF": ("pillow-avif-plugin", "pillow_avif", ""),
    "JPEG XL": ("pillow-jxl-plugin", "pillow_jxl", ""),
}
"""By format: the package to install, the module to import, and the function that registers the
plugin; "" if importing does."""

OTHERS = {
    "PDF": "a PDF, not an image; save its page as PNG or JPEG",
    "SVG": "an SVG drawing, not an image of pixels; save it as PNG",
    "HTML": "a web page, not an image: its download failed",
    "LFS": "a pointer of Git LFS, not the image; fetch it with git lfs pull",
    "video": "a video, not an image; save its frames as PNG or JPEG",
}


def load_plugin(head: bytes) -> bool:
    """Registers the plugin for the format of a picture with Pillow. Returns False if there is none,
    or it is not installed. `head`: the first HEAD bytes."""
    _, module, register = PLUGINS.get(format_of(head), ("", "", ""))
    if not module or find_spec(module) is None:
        return False
    loaded = import_module(module)
    if register:
        getattr(loaded, register)()
    return True


def named(head: bytes) -> str:
    """A clause for a message about what Pillow cannot open: what it is, and what to do. `head`: the
    first HEAD bytes."""
    format_name = format_of(head)
    if format_name in PLUGINS:
        package, module, _ = PLUGINS[format_name]
        if format_name in Image.OPEN or find_spec(module) is not None:
            return f"a damaged {format_name} picture"
        return (
            f"{format_name} pictures need {package}: pip install {package}, or save the picture as"
            " PNG or JPEG"
        )
    return OTHERS.get(format_name, "not an image, or of an unknown format")


def format_of(head: bytes) -> str:
    """The format of what begins with `head`: a key of PLUGINS or OTHERS, or "" for any other."""
    if head[4:8] == b"ftyp":
        brands = [head[8:12], *(head[place : place + 4] for place in range(16, 64, 4))]
        pictures = {BRANDS[brand] for brand in brands if brand in BRANDS}
        return min(pictures, default="video")  # AVIF files name a brand of HEIC's container too
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "SVG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    return next((name for start, name in SIGNATURES if head.startswith(start)), "")
