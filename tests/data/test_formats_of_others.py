"""Rows of other programs become the same examples as rows of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opd.data import Reading, formats, open_data
from opd.data.choices import with_choices
from opd.data.formats import BUILT_IN, NAMED, WHOLE
from opd.data.formats.coco import COCO
from opd.data.formats.conversation import SYSTEM_UNREAD, TURNS_UNREAD
from opd.data.formats.own import Said
from opd.data.formats.v_star import V_STAR, shuffled
from opd.data.formats.vision_opd import FRAMED, PAPER
from opd.data.images import open_image
from opd.data.remarks import PLACE_TOLD
from opd.errors import DataError
from opd.types import Box
from tests.support.format_rows import (
    ASKED,
    BOX,
    CLEAN,
    FOLDER,
    FORMATS,
    FRAMED_ONES,
    FRUITS,
    LETTERED,
    ON_ONE_LINE,
    QUESTION,
    ROWS,
    SENTENCE,
    SWIFT,
    SWIFT_CROP,
    VISUAL_COT,
    WITH_BOX,
    WITH_CROP,
    example,
    llava,
    picture,
    turns,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("full", "framed", "crop"):
        (tmp_path / f"{name}.png").write_bytes(picture())
    return tmp_path


def pixels(source: Any) -> Any:
    return np.asarray(open_image(source))


@pytest.mark.parametrize("key", ROWS)
def test_a_row_of_every_format_is_the_example_of_our_own_row(folder: Path, key: str) -> None:
    found, _ = example(folder, FORMATS[key], ROWS[key])
    assert found.choices if key != "vstar" else sorted(found.choices) == sorted(FRUITS)
    asked = with_choices(found.question, found.choices)
    if key == "vstar":
        assert found.choices["ABCD".index(str(found.answer))] == "plum"
        assert found.question == ASKED
    else:
        assert found.choices == tuple(
            f"({letter}) {fruit}" if key.startswith("mme") else fruit
            for letter, fruit in LETTERED.items()
        )
        assert str(found.answer).strip("()") == ("plum" if key.startswith("visual-cot") else "C")
        # The options stand once in what is asked, whether the row holds them apart or not.
        wanted = {"vstar-table": ON_ONE_LINE, "openai": f"{QUESTION}<image>"}.get(key, QUESTION)
        assert asked == (f"{QUESTION}\n\n{SENTENCE}" if key in FRAMED_ONES else wanted)
    (image,) = found.images
    assert np.array_equal(pixels(image), pixels(folder / "full.png"))
    if key in FRAMED_ONES:
        assert (image, *found.teacher_images) == (folder / "framed.png", folder / "crop.png")
    if key in WITH_BOX:
        # Thousandths of 300 x 200 pixels are not exact.
        expected = Box(103.8, 55, 191.1, 82) if key == "llava" else Box(*BOX)
        assert found.boxes == (expected,)
        assert found.teacher_images == ()
    else:
        assert found.boxes == ()
        assert len(found.teacher_images) == (key in WITH_CROP)
    asked_of_teacher = {"v-zero": f"This is a part. {QUESTION}"}.get(key)
    assert found.teacher_question == asked_of_teacher


@pytest.mark.parametrize("key", ROWS)
def test_every_row_is_of_one_format(key: str) -> None:
    """Of formats that match, the one whose marks hold all marks of another is meant."""
    matching = [reader for reader in BUILT_IN if reader.matches(ROWS[key])]
    left = [
        one.key
        for one in matching
        if not any(set(one.marks) < set(other.marks) for other in matching)
    ]
    assert left == [key]


def test_every_format_has_a_key_and_a_test() -> None:
    assert {*ROWS, "vision-opd-paper"} == set(FORMATS)
    assert len({reader.name for reader in FORMATS.values()}) == len(FORMATS)


def test_every_format_is_in_the_documentation() -> None:
    page = (Path(formats.__file__).parents[3] / "docs" / "data.md").read_text()
    for reader in [*BUILT_IN, *NAMED, *WHOLE]:
        assert f"`{reader.key}`" in page


def read(folder: Path, *rows: Any, name: str = "data.jsonl", **said: Any) -> Any:
    array = name.endswith(".json")
    content = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(content)
    return open_data(str(folder / name), evidence=False, reading=Reading(**said))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("key", ROWS)
def test_a_file_is_recognised_by_its_rows(folder: Path, key: str, name: str) -> None:
    found = read(folder, ROWS[key], ROWS[key], name=name)
    assert found.notes[0] == f"{folder / name}: read as {FORMATS[key].name}: 2 rows"
    assert [one.source for one in found] == [f"{name}:1", f"{name}:2"]
    assert found.skipped == []


def test_the_rows_of_a_coco_file(folder: Path) -> None:
    content = whole()
    content["annotations"].append({**content["annotations"][0], "iscrowd": 1})
    (folder / "coco.json").write_text(json.dumps(content, indent=1))
    reading = Reading(question="What is in the region?")
    (found,) = data = open_data(str(folder / "coco.json"), reading=reading)
    assert (found.question, found.answer, found.boxes) == (reading.question, "plum", (Box(*BOX),))
    assert [source for source, _ in data.skipped] == ["coco.json:2"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r'--set "data\.question=What is in the region\?"'):
        open_data(str(folder / "coco.json"))


def test_the_folders_of_v_star(folder: Path) -> None:
    for number in range(3):
        (folder / "vs" / "direct").mkdir(parents=True, exist_ok=True)
        (folder / "vs" / "direct" / f"sa_{number}.png").write_bytes(picture())
        row = {name: value for name, value in FOLDER.items() if name != "image"}
        (folder / "vs" / "direct" / f"sa_{number}.json").write_text(json.dumps(row))
    found = open_data(str(folder / "vs"))
    assert [one.boxes for one in found] == [(Box(*BOX),)] * 3
    assert {one.choices["ABCD".index(str(one.answer))] for one in found} == {"plum"}


def test_the_papers_way_is_read_where_it_is_named(folder: Path) -> None:
    (named,) = read(folder, CLEAN, format="vision-opd-paper")
    assert named.teacher_images == (folder / "crop.png",)
    found, heard = example(folder, PAPER, CLEAN)
    assert found.images == (folder / "framed.png",)
    assert found.teacher_images == (folder / "crop.png",)
    assert (found.boxes, found.choices, found.answer) == ((), FRUITS, "C")
    assert found.question == f"{QUESTION}\n\n{SENTENCE}"
    assert heard == [FRAMED]
    assert PAPER not in BUILT_IN


# COCO


def whole(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 7, "image_id": 1, "category_id": 3, "bbox": [104, 55, 87, 27]}
    return {
        "images": [{"id": 1, "file_name": "full.png", "width": 300, "height": 200}],
        "categories": [{"id": 3, "name": "plum"}],
        "annotations": [{**annotation, "iscrowd": 0, **changes}],
    }


def test_annotations_of_coco_are_joined(folder: Path) -> None:
    (row,) = COCO.to_rows(whole())
    found, _ = example(folder, COCO, row, Said(question="What is in the region?"))
    assert found.boxes == (Box(*BOX),)
    assert (found.question, found.answer, found.id) == ("What is in the region?", "plum", "7")
    assert found.images == (folder / "full.png",)
    with pytest.raises(DataError, match=r"'question' is missing: .*data\.question"):
        example(folder, COCO, row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iscrowd": 1}, r"a crowd \(iscrowd\) is not one object"),
        ({"image_id": 2}, "field 'image_id': 2 is the id of no entry"),
        ({"image_id": [1]}, r"field 'image_id': \[1\] is the id of no entry"),
        ({"category_id": None}, "field 'category_id': null is the id of no entry"),
        ({"bbox": [104, 55, 300, 27]}, "field 'bbox': box .* is outside the image"),
        ({"bbox": [104, 55]}, r"field 'bbox': .*\[left, top, width, height\]; a point has no"),
        ({"bbox": [[1, 2], [3, 4]]}, "field 'bbox': "),
    ],
)
def test_an_annotation_that_cannot_be_used_is_a_faulty_row(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    (row,) = COCO.to_rows(whole(**changes))
    with pytest.raises(DataError, match=message):
        example(folder, COCO, row, Said(question="What?"))


def test_what_is_not_coco_is_told() -> None:
    assert COCO.matches(whole())
    for name in ("images", "annotations"):
        without = {key: value for key, value in whole().items() if key != name}
        assert not COCO.matches(without)
        with pytest.raises(DataError, match=f"field '{name}' is missing"):
            COCO.to_rows(without)
    (fault,) = COCO.to_rows({**whole(), "annotations": [5]})
    assert "an annotation is an object, but this is 5" in str(fault["fault"])
    (row,) = COCO.to_rows({"images": [{"id": 1}], "annotations": [{"image_id": 1}]})
    assert row["answer"] is None


# Traps


def test_the_first_option_of_v_star_stands_anywhere() -> None:
    places = []
    for number in range(400):
        own = V_STAR.own({**FOLDER, "image": f"direct_attributes/sa_{number}.jpg"})
        assert own["choices"]["ABCD".index(own["answer"])] == "plum"
        places.append(own["answer"])
    assert all(70 <= places.count(letter) <= 130 for letter in "ABCD")
    # The place depends on the picture's name, not on its folder or the process.
    assert shuffled("sa_1\nWhich?", ["plum", "pear", "fig", "kiwi"]) == [1, 2, 0, 3]
    elsewhere = V_STAR.own({**FOLDER, "image": "/data/x/sa_1.jpg"})
    assert elsewhere["answer"] == places[1]


def test_references_of_swift_are_named_and_boxes_told(folder: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "You see <ref-object>."},
            *turns("<image>Is <ref-object> left of <bbox>?", "<ref-object><bbox> is."),
        ],
        "images": ["full.png", "crop.png"],
        "objects": {"ref": ["fruit", "a fig"], "bbox": [BOX, BOX], "image_id": [0, 1]},
    }
    found, heard = example(folder, FORMATS["ms-swift"], row)
    assert found.question == "Is fruit left of <bbox>?"
    assert found.answer == "a fig is."
    assert found.boxes == (Box(*BOX), Box(*BOX, image=1))
    assert heard == [PLACE_TOLD, SYSTEM_UNREAD]
    grounding = {**row, "messages": turns("Where is it?", '[{"bbox_2d": <bbox>}]')}
    assert example(folder, FORMATS["ms-swift"], grounding)[0].answer is None
    normal = {**SWIFT, "objects": {"bbox": [[0.1, 0.2, 0.5, 0.6]], "bbox_type": "norm1"}}
    assert example(folder, FORMATS["ms-swift"], normal)[0].boxes == (Box(30, 40, 150, 120),)


def test_the_teacher_of_swift(folder: Path) -> None:
    found, _ = example(folder, FORMATS["ms-swift"], SWIFT_CROP)
    assert found.teacher_images == (folder / "crop.png",)
    assert found.teacher_question == f"Look closely. {QUESTION}"
    alone = {name: value for name, value in SWIFT_CROP.items() if name != "teacher_images"}
    assert example(folder, FORMATS["ms-swift"], alone)[0].teacher_images == found.images
    with pytest.raises(DataError, match="a teacher without pictures"):
        FORMATS["ms-swift"].own({**SWIFT_CROP, "teacher_images": []})


def test_of_several_turns_the_first_are_read(folder: Path) -> None:
    row = {
        "image": "full.png",
        "conversations": llava("<image>\nWho?", "He.", "Why?", "So."),
    }
    found, heard = example(folder, FORMATS["llava"], row)
    assert (found.question, found.answer) == ("Who?", "He.")
    assert heard == [TURNS_UNREAD]


@pytest.mark.parametrize(
    ("answer", "unit", "box", "words"),
    [
        ("<|box_start|>(100,200),(500,600)<|box_end|>", "", (30, 40, 150, 120), None),
        (
            "<|object_ref_start|>the fig<|object_ref_end|>"
            "<|box_start|>(100, 200), (500, 600)<|box_end|> is green",
            "",
            (30, 40, 150, 120),
            "the fig is green",
        ),
        (
            '```json\n[{"bbox_2d": [100, 200, 500, 600]}]\n```',
            "per-mille",
            (30, 40, 150, 120),
            None,
        ),
        (
            '{"bbox_2d": [14, 14, 28, 28], "label": "x"}',
            "resized",
            (13.64, 14.29, 27.27, 28.57),
            None,
        ),
    ],
)
def test_boxes_in_texts_of_qwen(
    folder: Path, answer: str, unit: str, box: tuple[float, ...], words: str | None
) -> None:
    row = {"image": "full.png", "conversations": llava("<image>\nWhere is the fig?", answer)}
    found, heard = example(folder, FORMATS["llava"], row, Said(box_format=unit))
    (only,) = found.boxes
    assert (only.x0, only.y0, only.x1, only.y1) == pytest.approx(box, abs=0.01)
    assert (found.question, found.answer, heard) == ("Where is the fig?", words, [])
    asked = {"image": "full.png", "conversations": llava(f"What is in {answer}?", "A fig")}
    found, heard = example(folder, FORMATS["llava"], asked, Said(box_format=unit))
    assert (found.boxes, found.answer, heard) == ((only,), "A fig", [PLACE_TOLD])
    if unit:
        with pytest.raises(
            DataError, match=r"say data\.box_format=resized .* or data\.box_format=per"
        ):
            example(folder, FORMATS["llava"], row)


def test_a_question_keeps_markers_that_stand_inside(folder: Path) -> None:
    row = {**SWIFT, "images": ["full.png", "crop.png"]}
    for question, kept in (
        ("<image>Q?", "Q?"),
        ("<image>\nQ?", "Q?"),
        ("Look: <image> Q?", "Look: <image> Q?"),
        ("<image><image>\nQ?", "<image><image>\nQ?"),
        ("Q?", "Q?"),
    ):
        found, _ = example(folder, FORMATS["ms-swift"], {**row, "messages": turns(question, "C")})
        assert found.question == kept
    with pytest.raises(DataError, match="3 '<image>' markers for 2 images"):
        example(folder, FORMATS["ms-swift"], {**row, "messages": turns("<image>" * 3 + "Q", "C")})


def test_a_turned_picture_of_visual_cot(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(folder / "turned.jpg", exif=exif)
    row = {**VISUAL_COT, "image": "turned.jpg"}
    found, heard = example(folder, FORMATS["visual-cot"], row)
    assert found.boxes == (Box(200 - 82, 104, 200 - 55, 191),)
    assert heard[0].startswith("the size that a row gives its picture is that before EXIF")
    upright = example(folder, FORMATS["visual-cot"], row, Said(box_image="upright"))
    assert upright[0].boxes == (Box(*BOX),)
    assert upright[1] == []
    with pytest.raises(DataError, match="'width, height': 150 x 100 is not the size of"):
        example(folder, FORMATS["visual-cot"], {**row, "width": 150, "height": 100})


def test_our_own_rows_may_have_columns_of_others(folder: Path) -> None:
    own = {"image": "full.png", "question": "Which?", "boxes": [[1, 2, 30, 40]]}
    (found,) = read(folder, {**own, "bboxs": [[9, 9, 20, 20]], "problem": "x", "bbox": [1]})
    assert found.boxes == (Box(1, 2, 30, 40),)
    assert read(folder, {**own, "remarks": ["x"], "fault": "y"})[0].boxes == found.boxes


def test_boxes_that_conversations_lack_are_missing_and_not_the_conversations(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (example,) = read(folder, {"image": "full.png", "conversations": turns})
    assert example.answer == "red"
    with pytest.raises(DataError, match=r"field 'boxes' is missing: .*opd data locate finds boxes"):
        open_data(str(folder / "data.jsonl"))
