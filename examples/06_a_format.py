# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""A format of one's own: a spreadsheet's CSV, with boxes as x, y, width and height.

python examples/06_a_format.py
"""

import tempfile
from pathlib import Path

from PIL import Image

import opd
from opd.data.formats import Mapped, register
from opd.errors import DataError

TABLE = """picture,x,y,w,h,ask,reply
shop.png,20,10,40,30,When does it open?,9 am
shop.png,20,ten,40,30,When does it close?,5 pm
"""


def to_own(row):
    """A row with opd's own fields (docs/data.md), which opd checks afterwards."""
    try:
        box = [float(row[side]) for side in "xywh"]
    except ValueError as error:
        raise DataError(f"a side of the box: {error}") from error
    return {"image": row["picture"], "question": row["ask"], "answer": row["reply"], "boxes": [box]}


# By its columns. Rows of Parquet, JSON lines and other files with these are read too.
columns = ("picture", "x", "y", "w", "h", "ask")
register(Mapped("a spreadsheet of boxes", columns, to_own, box_format="pixels-xywh"))
with tempfile.TemporaryDirectory() as folder:
    Image.new("RGB", (200, 100)).save(Path(folder) / "shop.png")
    (Path(folder) / "table.csv").write_text(TABLE)
    found = opd.read_data(Path(folder) / "table.csv")
    for example in found:
        print(f"{example.source}: {example.question} {example.boxes[0]} {example.answer}")
    print(*(f"skipped {row}: {reason}" for row, reason in found.skipped), sep="\n")
