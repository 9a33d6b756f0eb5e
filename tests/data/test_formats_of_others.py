"""Rows of other programs become the same examples as rows of our own."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from opd.data import open_data
from opd.data.choices import with_choices
from opd.data.formats.mapped import options_in
from opd.errors import DataError
from opd.types import Box

SENTENCE = "Only the part inside of the red frame matters."
OPTIONS = "A. pear\nB. fig\nC. plum\nD. kiwi"
QUESTION = f"Which fruit lies on the scale?\n{OPTIONS}"
CLEAN = {
    "problem": f"<image>\n{QUESTION}\n\n{SENTENCE}",
    "answer": "C",
    "images": ["framed.png"],
    "teacher_images": ["crop.png"],
    "original_images": ["full.png"],
    "bbox": [104, 55, 191, 82],
    "extra_info": {"question": QUESTION, "answer": "C"},
}
PARENT = {
    "problem": f"<image>\n{QUESTION}",
    "answer": "C",
    "images": ["full.png"],
    "bbox": [104, 55, 191, 82],
}
VISUAL_COT = {
    "image": "full.png",
    "question": QUESTION,
    "answer": "plum",
    "bboxs": [[104, 55, 191, 82]],
    "width": 300,
    "height": 200,
}
TREE = {
    "image": "full.png",
    "question": "Which fruit lies on the scale?",
    **dict(zip("ABCD", ("pear", "fig", "plum", "kiwi"), strict=True)),
    "answer": "C",
    "target_instances": "[[104, 55, 191, 82]]",
}
ROWS = {
    "Vision-OPD-6K, clean": CLEAN,
    "ZwZ-RL-VQA": PARENT,
    "Visual-CoT": VISUAL_COT,
    "TreeVGR": TREE,
}


@pytest.fixture
def folder(tmp_path):
    for name in ("full", "framed", "crop"):
        Image.linear_gradient("L").resize((300, 200)).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder, *rows, name="data.jsonl"):
    array = name.endswith(".json")
    text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return open_data(str(folder / name))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_row_of_every_format_is_the_same_example(folder, kind, name):
    found = read(folder, ROWS[kind], ROWS[kind], name=name)
    assert found.notes[0] == f"{folder / name}: read as {kind}: 2 rows"
    for place, example in enumerate(found, start=1):
        assert example.images == (folder / "full.png",)
        assert example.teacher_images == ()
        assert example.boxes == (Box(104, 55, 191, 82),)
        assert example.choices == ("pear", "fig", "plum", "kiwi")
        assert example.answer == ("plum" if kind == "Visual-CoT" else "C")
        assert example.source == f"{name}:{place}"
        # The options stand once in what is asked, whether the row holds them apart or not.
        assert with_choices(example.question, example.choices) == QUESTION
        assert SENTENCE not in example.question


def test_a_faulty_row_is_named(folder):
    texts = [{**TREE, "target_instances": "__import__('os').mkdir('x')"}, TREE]
    found = read(folder, TREE, *texts)
    assert [source for source, _ in found.skipped] == ["data.jsonl:2"]
    assert "field 'target_instances'" in found.skipped[0][1]
    assert not (folder / "x").exists()
    found = read(folder, CLEAN, {**CLEAN, "extra_info": {}}, {**CLEAN, "bbox": [9, 9, 900, 20]})
    assert [source for source, _ in found.skipped] == ["data.jsonl:2", "data.jsonl:3"]
    missing = {key: value for key, value in CLEAN.items() if key != "original_images"}
    found = read(folder, CLEAN, missing)
    assert found.skipped == [
        (
            "data.jsonl:2",
            "field 'original_images' is missing; Vision-OPD-6K, clean has it in every row",
        )
    ]
    with pytest.raises(DataError, match="in 'images' the evidence is framed"):
        read(folder, missing)


@pytest.mark.parametrize("boxes", [[[1, 2, 30, 40], [5, 6, 70, 80]], [1, 2, 30, 40]])
def test_boxes_may_be_several_or_one(folder, boxes):
    (found,) = read(folder, {**PARENT, "bbox": boxes})
    assert len(found.boxes) == (2 if isinstance(boxes[0], list) else 1)
    assert found.boxes[0] == Box(1, 2, 30, 40)


def test_our_own_rows_may_have_columns_of_others(folder):
    own = {"image": "full.png", "question": "Which?", "boxes": [[1, 2, 30, 40]]}
    (found,) = read(folder, {**own, "bboxs": [[9, 9, 20, 20]], "problem": "x", "bbox": [1]})
    assert found.boxes == (Box(1, 2, 30, 40),)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, ["pear", "fig", "plum", "kiwi"]),
        ("Which?\n(A) red\n(B) dark blue ", ["red", "dark blue"]),
        ("Which?\nA) red\nB) blue\n\nSay the letter.", ["red", "blue"]),
        ("A: red\nB: blue", ["red", "blue"]),
        ("Which?\nA. red", []),
        ("Which?\nA. red\nC. blue", []),
        ("I see A. and B. here", []),
        ("A. first\nno\nA. red\nB. blue", ["red", "blue"]),
        (None, []),
        (3, []),
    ],
)
def test_options_are_found_on_lines_of_their_own(question, options):
    assert options_in(question) == options
