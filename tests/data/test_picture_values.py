"""Pictures that are no files of their own are opened, measured and hashed as files are."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opd.data.images import image_size, open_image
from opd.data.picture_store import store_paths
from opd.data.pictures import SETTLED, Pictures
from opd.errors import DataError
from opd.types import Box, Example, Picture
from opd.views.images import student_images, teacher_images, teacher_sizes
from opd.views.view import ViewOptions
from tests.data.test_pictures import RAMP, png


@dataclass(frozen=True)
class Held(Picture):
    """A picture in the middle of a file: all of it but the first byte."""

    def read(self) -> bytes:
        return self.files[0].read_bytes()[1:]


def held(file: Path, name: str = "") -> Held:
    """The picture of a file, with a byte before it, as a picture of another file."""
    inside = file.with_suffix(".held")
    inside.write_bytes(b"x" + file.read_bytes())
    return Held(name or f"{inside.name}:1 image", (inside,))


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """A picture of 64 x 8 pixels whose left side is up."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((RAMP // 16).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


def test_a_picture_is_opened_as_its_file_is(turned: Path) -> None:
    picture = held(turned)
    assert image_size(picture) == (8, 64)
    np.testing.assert_array_equal(open_image(picture), open_image(turned))
    example = Example("a", (picture,), "?", (Box(0, 0, 4, 32),))
    views = ViewOptions(margin=0, min_size=1)
    assert [image.size for image in student_images(example)] == [(8, 64)]
    sizes = [image.size for image in teacher_images(example, views)]
    assert sizes == teacher_sizes(example, views)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_few_bits_in_sixteen_of_a_colour_are_not_dark_in_memory(tmp_path: Path, name: str) -> None:
    """They are read a second time in the other byte order."""
    file = tmp_path / name
    if name == "a.tif":
        Image.fromarray(RAMP).save(file, compression="tiff_lzw")
    else:
        png(file, np.stack([RAMP, RAMP // 2, RAMP], axis=2))
    picture = open_image(held(file))
    assert np.asarray(picture).max() == 255
    np.testing.assert_array_equal(picture, open_image(file))


def test_facts_are_kept_while_the_file_around_a_picture_stays(
    turned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.data.pictures.STORE_PICTURES", 1)
    picture, data = held(turned), turned.with_name("data.jsonl")
    content = turned.read_bytes()
    time.sleep(SETTLED + 0.05)
    pictures = Pictures(1 << 20, data)
    facts = pictures(picture)
    assert (facts.size, facts.orientation, facts.fault) == ((8, 64), 6, "")
    assert facts.digest == hashlib.sha256(content).digest() == pictures(turned).digest
    assert pictures.save() == store_paths(data)[0]

    reads: list[str] = []
    read = Held.read
    monkeypatch.setattr(Held, "read", lambda self: (reads.append(self.name), read(self))[1])
    again = Pictures(1 << 20, data)
    assert again(Held(picture.name, picture.files)) == facts
    assert reads == []
    assert again(Held("data.jsonl:2 image", picture.files)) == facts
    assert reads == ["data.jsonl:2 image"]
    os.utime(picture.files[0])
    assert Pictures(1 << 20, data)(picture) == facts
    assert reads == ["data.jsonl:2 image", picture.name]


def test_a_faulty_picture_is_named(tmp_path: Path) -> None:
    for content, message in (
        (b"", "image cannot be read: rows.jsonl:3 image: not an image, or of an unknown format"),
        (b"<svg/>", "image cannot be read: rows.jsonl:3 image: an SVG drawing"),
    ):
        (tmp_path / "a").write_bytes(content)
        picture = held(tmp_path / "a", "rows.jsonl:3 image")
        with pytest.raises(DataError) as caught:
            open_image(picture)
        assert str(caught.value).startswith(message)
        assert Pictures(1 << 20)(picture).fault.startswith(message)
    Image.new("L", (40, 20)).save(tmp_path / "b.png")
    assert Pictures(799)(held(tmp_path / "b.png")).fault.startswith(
        "b.held:1 image: 40 x 20 = 800 pixels, above data.max_image_pixels = 799"
    )
