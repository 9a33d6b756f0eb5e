"""Malformed rows of every format are faults of one line, which names a field of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.data import open_data
from opd.data.formats import BUILT_IN
from opd.data.formats.coco import COCO
from opd.data.formats.own import Said
from opd.data.picture_store import ImageFacts
from opd.errors import DataError
from tests.support.format_rows import (
    BOX,
    CLEAN,
    FORMATS,
    QUESTION,
    ROWS,
    SWIFT,
    example,
    llava,
    picture,
    turns,
)

CODE = "__import__('os').mkdir('executed')"
GROUNDING = llava("<image>\nWhere?", '{"bbox_2d": [1, 2, 30, 40]}')
BOTH = llava("Where?", '<|box_start|>(1,2),(3,4)<|box_end|> {"bbox_2d": [1, 2, 30, 40]}')


def objects(**changes: Any) -> dict[str, Any]:
    return {"objects": {**SWIFT["objects"], **changes}}


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("vision-opd", {"extra_info": {}}, "field 'extra_info': the question"),
    ("vision-opd", {"extra_info": None}, "data.format=vision-opd-paper reads the rows"),
    ("vision-opd", {"extra_info": "A"}, "field 'extra_info': the question"),
    ("vision-opd", {"extra_info": {"question": 7}}, "field 'extra_info': 7 is not a text"),
    ("vision-opd", {"bbox": [9, 9, 900, 20]}, "field 'bbox': box [9, 9, 900, 20] is outside"),
    ("vision-opd", {"bbox": [0.1, 0.1, 0.2, 0.2]}, "say data.box_format=fraction"),
    ("vision-opd", {"bbox": [191, 82, 104, 55]}, "field 'bbox': box [191, 82, 104, 55] is empty"),
    ("vision-opd", {"bbox": []}, ""),
    ("vision-opd", {"bbox": CODE}, "field 'bbox': "),
    ("vision-opd", {"original_images": None}, "field 'original_images' is missing"),
    ("vision-opd", {"original_images": [None]}, "field 'original_images': null"),
    (
        "vision-opd",
        {"original_images": "x.png"},
        "field 'original_images': \"x.png\" is not",
    ),
    ("vision-opd", {"answer": "E"}, "field 'answer': \"E\" is neither a letter nor the text"),
    ("vision-opd", {"answer": {"x": 1}}, "field 'answer': "),
    ("vision-opd", {"id": ["x"]}, "field 'id': "),
    ("vision-opd-paper", {"problem": "\ud83d"}, "field 'problem': "),
    ("vision-opd-paper", {"problem": "<image><image>x"}, "field 'problem': 2 '<image>' markers"),
    ("vision-opd-parquet", {"prompt": []}, "field 'prompt': no turn is the user's"),
    ("vision-opd-parquet", {"prompt": [{"content": "x"}]}, "field 'prompt': a turn of null"),
    ("vision-opd-parquet", {"bbox_images": "x"}, "field 'bbox_images': "),
    (
        "vision-opd-parquet",
        {"reward_model": {"ground_truth": ["x", 0, []]}},
        "'reward_model': \"x\"",
    ),
    ("zwz", {"problem": ["x"]}, "field 'problem': "),
    ("zwz", {"teacher_images": ["x.png"]}, "in 'images' the evidence is framed"),
    ("zwz", {"bbox": "[[1, 2], [3]]"}, "field 'bbox': [1, 2] is not a box of four numbers"),
    ("ms-swift", {"messages": turns()}, "field 'messages': no turn is the user's"),
    ("ms-swift", {"messages": "x" * 9}, ""),  # a question alone
    ("ms-swift", {"messages": 5}, "field 'messages': 5 is not a list of turns"),
    ("ms-swift", {"messages": [5]}, "field 'messages': 5 is not a turn"),
    ("ms-swift", {"messages": turns(["x", {"type": "video"}])}, "is neither text nor image"),
    ("ms-swift", {"messages": [{"role": "tool", "content": "x"}]}, 'a turn of "tool" is not read'),
    ("ms-swift", objects(bbox=[[1, 2]]), "field 'objects.bbox': [1, 2] is not a box of four"),
    (
        "ms-swift",
        objects(bbox_type="norm1000"),
        "field 'objects.bbox_type': \"norm1000\"",
    ),
    ("ms-swift", objects(bbox_type="norm1"), "field 'objects.bbox': box [104, 55, 191, 82] is"),
    ("ms-swift", objects(image_id=[0, 0]), "field 'objects.image_id': 2 pictures for 1 boxes"),
    ("ms-swift", objects(image_id=[3]), "field 'objects.bbox': image 3 of box"),
    ("ms-swift", objects(ref="x"), "field 'objects.ref': "),
    ("ms-swift", {"objects": "{"}, "field 'objects': "),
    ("ms-swift", {"objects": [1]}, "field 'objects': "),
    (
        "ms-swift",
        {"messages": turns("<ref-object><ref-object>?")},
        "field 'objects.ref': fewer",
    ),
    ("ms-swift", {"teacher_images": []}, "a teacher without pictures"),
    ("ms-swift", {"teacher_prompt": 5}, "field 'teacher_prompt': 5"),
    (
        "ms-swift",
        {"teacher_prompt": "<image>" * 2 + "?"},
        "field 'teacher_prompt': 2 '<image>'",
    ),
    ("ms-swift", {"images": 5}, "field 'images': 5"),
    ("ms-swift-query", {"query": {}}, "field 'query': "),
    (
        "trl",
        {"prompt": turns([{"type": "text"}])},
        "field 'prompt': null is not the text",
    ),
    ("trl", {"prompt": turns([{"type": "audio"}])}, "field 'prompt': a block "),
    ("trl", {"image": {"bytes": None, "path": None}}, "field 'image': "),
    ("trl-messages", {"images": [{}]}, "field 'images': "),
    ("openai", {"messages": turns([{"type": "image_url", "image_url": {}}])}, "field 'messages': "),
    ("openai", {"messages": turns("no picture")}, "field 'image' is missing"),
    ("llava", {"conversations": {}}, "field 'conversations': "),
    ("llava", {"conversations": llava("")}, "field 'conversations': \"\" is not a text"),
    ("llava", {"image": None}, "field 'image' is missing"),
    ("llava", {"conversations": GROUNDING}, "'bbox_2d' has two meanings"),
    ("llava", {"conversations": BOTH}, "a text holds both <|box_start|> and 'bbox_2d'"),
    ("visual-cot", {"width": 30}, "field 'width, height': 30 x 200 is not the size of the picture"),
    ("visual-cot", {"width": "x"}, "field 'width, height': "),
    ("visual-cot", {"bboxs": {"x": 1}}, "field 'bboxs': "),
    ("visual-cot", {"bboxs": [1, 2, 3, 4] * 2}, "field 'bboxs': [1, 2, 3, 4, 1, 2, 3, 4] are 8"),
    ("visual-cot-llava", {"image": ["full.png", "b.png###[1, 2, 3, 4]"]}, "the picture b.png of a"),
    ("visual-cot-llava", {"image": ["full.png###[1, 2, 3"]}, "field 'image': \"[1, 2, 3\" is not"),
    ("visual-cot-llava", {"image": ["full.png###", 5]}, "field 'image': "),
    ("treevgr", {"target_instances": CODE}, "field 'target_instances': "),
    ("treevgr", {"target_instances": "[[1, 2, 3]]"}, "field 'target_instances': [1, 2, 3] is not"),
    ("treevgr", {"B": None}, "field 'B' is missing: later options are there"),
    ("treevgr", {"A": ["x"]}, "field 'choices': "),
    ("v-zero", {"teacher_raw_prompt": [[]]}, "field 'teacher_raw_prompt': "),
    ("v-zero", {"teacher_images": [3]}, "field 'teacher_images': 3"),
    ("vstar", {"options": ["plum"]}, "field 'options': "),
    ("vstar", {"options": ["plum", 5]}, "field 'options': "),
    ("vstar", {"options": [str(number) for number in range(27)]}, "a list of 2 to 26 texts"),
    ("vstar", {"options": CODE}, "field 'options': "),
    ("vstar", {"bbox": [[290, 55, 87, 27]]}, "field 'bbox': box [290, 55, 87, 27] is outside"),
    ("vstar-table", {"label": "E"}, "field 'label': \"E\" is neither"),
    ("hr-bench", {"answer": 7}, "field 'answer': 7 is neither"),
    ("hr-bench", {"image": "x/" * 40_000}, "field 'image': "),
    ("mme-realworld", {"multi-choice options": CODE}, "field 'multi-choice options': "),
    ("mme-realworld", {"multi-choice options": "['a', b]"}, "field 'multi-choice options': "),
    ("mme-realworld", {"multi-choice options": "[" * 100_001}, "field 'multi-choice options': "),
    ("mme-realworld", {"multi-choice options": 5}, "field 'multi-choice options': 5"),
    ("mme-realworld-json", {"Ground truth": []}, ""),  # no answer
    ("mme-realworld-json", {"Answer choices": {}}, "field 'Answer choices': "),
    ("zoombench", {"crop_image": 5}, "field 'crop_image': 5"),
    ("cv-bench", {"choices": "[]"}, "field 'choices': "),
    ("cv-bench", {"answer": "(Z)"}, "field 'answer': "),
]


def base(key: str) -> dict[str, Any]:
    return CLEAN if key == "vision-opd-paper" else ROWS[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed")
    for name in ("full", "framed", "crop", "x"):
        (folder / f"{name}.png").write_bytes(picture())
    return folder


def known_size(source: Any) -> ImageFacts:
    return ImageFacts((300, 200), b"")


@pytest.mark.parametrize(
    ("key", "changes", "message"), MALFORMED, ids=[f"{key}-{said}" for key, _, said in MALFORMED]
)
def test_a_malformed_row_is_a_fault_of_one_line(
    folder: Path,
    key: str,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    row = {**base(key), **changes}
    if message:
        with pytest.raises(DataError) as caught:
            example(folder, FORMATS[key], row, facts=known_size)
        said = str(caught.value)
        assert message in said
        assert "\n" not in said
        assert len(said) < 400
    else:
        example(folder, FORMATS[key], row, facts=known_size)
    assert not (folder / "executed").exists()


def test_malformed_rows_of_a_file_are_counted(folder: Path) -> None:
    bad = [{**CLEAN, **changes} for key, changes, said in MALFORMED if key == "vision-opd" and said]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [CLEAN, *bad, CLEAN])))
    found = open_data(str(folder / "data.jsonl"))
    assert [one.source for one in found] == ["data.jsonl:1", f"data.jsonl:{len(bad) + 2}"]
    assert len(found.skipped) == len(bad) >= 12  # type: ignore[attr-defined]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["full.png", QUESTION, "<image>", "<bbox>", "<ref-object>", "user", "###"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.just(BOX)
        | st.dictionaries(
            st.sampled_from(
                "role from content value type text image url path bytes bbox ref image_id bbox_type"
                " question ground_truth".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
CHANGED = st.sampled_from(sorted(ROWS)).flatmap(
    lambda key: st.tuples(
        st.just(key),
        st.dictionaries(st.sampled_from(sorted(ROWS[key])), VALUES, min_size=1, max_size=2),
    )
)


def one_line(read: Any) -> None:
    said = ""
    try:
        read()
    except DataError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
    said.encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CHANGED)
def test_any_value_in_any_field_is_read_or_one_line(folder: Path, changed: Any) -> None:
    key, changes = changed
    row = {**ROWS[key], **changes}
    for reader in BUILT_IN:
        assert reader.matches(row) in (True, False)
    one_line(lambda: example(folder, FORMATS[key], row, Said(question="?"), known_size))


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "images": VALUES | st.just([{"id": 1, "file_name": "full.png"}]),
            "categories": VALUES,
            "annotations": VALUES
            | st.lists(
                st.fixed_dictionaries(
                    {"image_id": st.just(1) | VALUES, "category_id": VALUES, "bbox": VALUES}
                ),
                max_size=3,
            ),
        }
    )
)
def test_any_object_is_coco_or_one_line(folder: Path, whole: Any) -> None:
    assert COCO.matches(whole) in (True, False)
    rows: list[Any] = []
    one_line(lambda: rows.extend(COCO.to_rows(whole)))
    for row in rows:
        one_line(lambda row=row: example(folder, COCO, row, Said(question="?"), known_size))
