# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd"]
# [tool.uv.sources]
# vision-opd = { path = "../.." }
# ///
"""Photographs of a notice board, with a row of pairs.jsonl for each: what your own data look like.

python make_photos.py [FOLDER]

Every picture is drawn here, so that nothing has to be downloaded: a cork board with papers and
coloured tiles, each with one digit. A box marks the tile that the question asks about.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from opd.tiny.task import COLOURS, MASKS, TILE


def board(random, width, height):
    """An empty cork board in the light of a window."""
    cork = np.array([150, 118, 84]) + random.normal(0, 9, (height, width, 1))
    light = np.linspace(random.uniform(0.75, 1.1), random.uniform(0.75, 1.1), width)
    shaded = cork * light[None, :, None]
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8))


def paper(random, draw, width, height):
    """A sheet with lines of writing that nobody can read."""
    x, y = random.integers(0, width - 20), random.integers(0, height - 24)
    grey = int(random.integers(190, 235))
    draw.rectangle((x, y, x + 19, y + 25), fill=(grey, grey, grey - 8))
    for line in range(y + 4, y + 24, 4):
        draw.line((x + 3, line, x + int(random.integers(9, 17)), line), fill=(110, 110, 120))


def places(random, count, width, height):
    """Upper left corners of tiles that do not touch."""
    while True:
        found = []
        for _ in range(200):
            x = int(random.integers(8, width - TILE - 8))
            y = int(random.integers(8, height - TILE - 8))
            if all(abs(x - a) > TILE + 2 or abs(y - b) > TILE + 2 for a, b in found):
                found.append((x, y))
                if len(found) == count:
                    return found


def photograph(random):
    """A photograph of the board, and the tiles on it: (colour, digit, box in pixels)."""
    width, height = [(160, 112), (128, 128), (112, 160)][random.integers(3)]
    image = board(random, width, height)
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        paper(random, draw, width, height)
    tiles = []
    names = random.permutation(list(COLOURS))[: random.integers(5, 9)]
    for name, (x, y) in zip(names, places(random, len(names), width, height), strict=True):
        shade = random.integers(-12, 13)
        fill = tuple(int(np.clip(value + shade, 0, 255)) for value in COLOURS[str(name)])
        draw.rectangle((x + 1, y + 1, x + TILE, y + TILE), fill=(70, 55, 40))
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=fill)
        digit = int(random.integers(10))
        ink = (25, 25, 25) if sum(fill) > 400 else (240, 240, 240)
        draw.bitmap((x + 4, y + 2), MASKS[digit], fill=ink)
        tiles.append((str(name), digit, [x, y, x + TILE, y + TILE]))
    return image.filter(ImageFilter.GaussianBlur(0.4)), tiles


def write(folder, name, count, seed):
    """Writes photographs and the data file NAME.jsonl that names them."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    with (folder / f"{name}.jsonl").open("w") as file:
        for number in range(count):
            image, tiles = photograph(random)
            path = f"photos/{name}-{number:03}.jpg"
            image.save(folder / path, quality=92)
            colour, digit, box = tiles[random.integers(len(tiles))]
            row = {
                "image": path,
                "question": f"What digit is on the {colour} tile?",
                "boxes": [box],
                "answer": str(digit),
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    write(folder, "pairs", 600, seed=1)
    write(folder, "held", 200, seed=2)
    print(f"{folder}/pairs.jsonl: 600 rows, {folder}/held.jsonl: 200 rows")
