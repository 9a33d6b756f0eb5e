"""Which format the rows of a file have: by the first rows, or by what a person says."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import opd
from opd.data import formats, read_dataset
from opd.data.formats import Mapped, register
from opd.data.reading import Reading
from opd.errors import DataError, RecipeError, plural
from opd.run import recipe as recipes

OWN = {"image": "a.png", "question": "What?", "boxes": [[1, 2, 30, 40]]}
BOX = [[1, 2, 30, 40]]


def mapped(name, *marks, **others):
    def to_own(row):
        return {"image": "a.png", "question": name, "boxes": BOX}

    return Mapped(name, marks, to_own, key=name, **others)


@pytest.fixture
def read(tmp_path, monkeypatch, registers):
    """Reads rows with these formats alone: x and xy by fewer and more marks, z by another."""
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    formats_here = [mapped("x", "x"), mapped("xy", "x", "y"), mapped("z", "z")]
    monkeypatch.setattr(formats, "BUILT_IN", formats_here)
    monkeypatch.setattr(formats, "NAMED", [mapped("named", "x")])

    def read(*rows, **said):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        data = read_dataset(path, reading=Reading(**said))
        return [example.question for example in data], data.notes[:1]

    return read


@pytest.mark.parametrize(
    ("rows", "questions"),
    [
        ([{"x": 1}], ["x"]),
        ([{"x": 1, "y": 1}], ["xy"]),
        ([{"x": 1, "y": 1}, {"x": 1, "y": 1}, {"x": 1}], ["xy", "xy"]),
        ([{"x": 1, "y": 1}, {"x": 1}, {"x": 1}], ["x", "x", "x"]),
        ([{"x": 1}, {"z": 1}], ["x"]),  # as many rows: the first decides
        ([{"z": 1}, {"x": 1}], ["z"]),
        ([{**OWN, "x": 1}, OWN], ["What?", "What?"]),
        ([[1], {"x": 1}], ["x"]),
        ([{"x": 1}] * 32 + [{"z": 1}] * 40, ["x"] * 32),
    ],
)
def test_the_first_rows_decide(read, rows, questions):
    found, notes = read(*rows)
    assert found == questions
    if "What?" not in found:
        count = plural(len(rows), "row")
        assert notes[0].endswith(f"rows.jsonl: read as {found[0]}: {count}")


def test_several_formats_are_told(read):
    with pytest.raises(DataError) as caught:
        read({"x": 1, "z": 1}, {"x": 1, "z": 1})
    said = (
        "rows.jsonl: the rows may be x or z; say which: --set data.format=x or --set data.format=z"
    )
    assert str(caught.value).endswith(said)
    assert read({"x": 1, "z": 1}, format="z")[0] == ["z"]


def test_a_person_says_the_format(read):
    assert read({"x": 1, "y": 1}, format="x")[0] == ["x"]
    assert read({"x": 1, "y": 1}, format="named")[0] == ["named"]
    assert read({**OWN, "x": 1}, format="x")[0] == ["x"]
    assert read({**OWN, "x": 1}, format="opd")[0] == ["What?"]
    assert read(OWN, OWN, format="opd") == (["What?", "What?"], [])
    with pytest.raises(DataError, match=r"data.format = 'nmaed': unknown; did you mean 'named'\?"):
        read(OWN, format="nmaed")
    with pytest.raises(DataError, match="unknown; known: coco, named, opd, x, xy, z"):
        read(OWN, format="qqqqqq")
    with pytest.raises(DataError, match="is a file of one JSON object"):
        read(OWN, OWN, format="coco")


def test_columns_go_before_a_format(read):
    assert read({"x": 1, "q": "Which?"}, format="x", columns={"question": "q"})[0] == ["Which?"]
    mine = {"image": "x", "question": "y", "boxes": "z"}
    assert read({"x": "a.png", "y": "Mine?", "z": BOX}, columns=mine)[0] == ["Mine?"]


def test_a_registered_format_of_rows_goes_first(read):
    register(mapped("mine", "x"))
    assert read({"x": 1, "y": 1})[0] == ["mine"]
    assert read({"x": 1, "y": 1}, format="xy")[0] == ["xy"]
    register(mapped("inches", "x", box_format="fraction"))
    with pytest.raises(DataError, match="range of fraction"):
        read({"x": 1}, format="inches")


def test_the_options_of_a_recipe(tmp_path):
    said = ["data.columns.question=prompt", "data.columns.image=a.b", "data.format=zwz"]
    recipe = recipes.load("tiny", said)
    assert recipe.data.columns == {"question": "prompt", "image": "a.b"}
    path = tmp_path / "config.toml"
    path.write_text(recipes.write(recipe, {}))
    assert recipes.reread(path) == recipe
    for wrong, message in (
        ("data.columns.questoin=x", "no field is called 'questoin'; did you mean 'question'?"),
        ("data.box_format=pixel", "no unit of boxes has this name; did you mean 'pixels'?"),
        ("data.box_image=raw", "data.box_image = 'raw'"),
        ("data.columns=5", "data.columns"),
        ("run.steps.more=5", "run.steps"),
    ):
        with pytest.raises(RecipeError) as caught:
            recipes.load("tiny", [wrong])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_program_says_how_a_file_is_read(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    path = tmp_path / "rows.csv"
    path.write_text("where,what\na.png,What?\n")
    columns = {"image": "where", "question": "what"}
    (found,) = opd.read_data(path, evidence=False, reading={"columns": columns})
    assert (found.question, found.boxes) == ("What?", ())
    with pytest.raises(RecipeError, match=r"unknown key data\.colums; did you mean 'columns'"):
        opd.read_data(path, reading={"colums": columns})
