# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""A format of one's own: a spreadsheet's CSV, with boxes as x, y, width and height.

python examples/06_a_format.py
"""

import csv
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image

import opd
from opd.data.formats import Rows, register
from opd.errors import DataError

TABLE = """picture,x,y,w,h,ask,reply
shop.png,20,10,40,30,When does it open?,9 am
shop.png,20,ten,40,30,When does it close?,5 pm
"""


class Spreadsheet:
    """Reads tables with the columns above."""

    name = "a spreadsheet of boxes"

    def recognise(self, path, start):
        """By its headings."""
        return start.startswith(b"picture,x,y,w,h,")

    def read(self, path):
        """Every line as a function that gives a row of opd's own fields (docs/data.md)."""
        lines = list(csv.DictReader(path.read_text().splitlines()))
        rows = [(number, partial(self.row, line)) for number, line in enumerate(lines, start=2)]
        return Rows(path, path.read_bytes(), rows)

    def row(self, line):
        """One line; opd checks the picture, the box and the texts afterwards."""
        try:
            x, y, w, h = (float(line[side]) for side in "xywh")
        except ValueError as error:
            raise DataError(f"a side of the box: {error}") from error
        fields = {"image": line["picture"], "question": line["ask"], "answer": line["reply"]}
        return {**fields, "boxes": [[x, y, x + w, y + h]]}


register(Spreadsheet())
with tempfile.TemporaryDirectory() as folder:
    Image.new("RGB", (200, 100)).save(Path(folder) / "shop.png")
    (Path(folder) / "table.csv").write_text(TABLE)
    found = opd.read_data(Path(folder) / "table.csv")
    for example in found:
        print(f"{example.source}: {example.question} {example.boxes[0]} {example.answer}")
    print(*(f"skipped {row}: {reason}" for row, reason in found.skipped), sep="\n")
