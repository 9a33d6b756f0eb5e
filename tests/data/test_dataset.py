"""Reading our own JSONL: real image files, and every fault with its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from opd.data import DataOptions, Dataset, Reading, open_data, read_dataset
from opd.data.images import open_image
from opd.errors import DataError
from opd.types import Box, Example

WIDTH, HEIGHT = 40, 20
GOOD = {"image": "a.png", "question": "What?", "boxes": [[1, 2, 11, 12]]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files of 40 x 20 pixels, left half red and right half white, in the formats that real
    data comes in."""
    folder = tmp_path_factory.mktemp("images")
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    image.paste((255, 0, 0), (0, 0, WIDTH // 2, HEIGHT))
    image.save(folder / "a.png")
    image.save(folder / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # shown turned to the left by 90 degrees
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    image.save(folder / "a.webp", lossless=True)
    image.quantize(4).save(folder / "palette.gif")
    image.convert("P").save(
        folder / "palette.png", transparency=image.convert("P").getpixel((30, 5))
    )
    image.convert("L").save(folder / "grey.png")
    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    clear.save(folder / "rgba.png")
    clear.convert("LA").save(folder / "la.png")
    deep = np.full((HEIGHT, WIDTH), 65535, dtype=np.uint16)
    deep[:, : WIDTH // 2] = 76 * 257
    Image.fromarray(deep).save(folder / "deep.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.convert("1").save(folder / "bilevel.png")
    Image.effect_noise((200, 200), 60).save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.png").write_text("this is no image")
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(folder / "float.tiff")
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(folder / "integer.tiff")
    return folder


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows),
        encoding="utf-8",
    )
    return path


def one(folder: Path, **fields: Any) -> Example:
    (example,) = read_dataset(write(folder, {**GOOD, **fields}), strict=True)
    return example


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("a.png", (255, 0, 0), (255, 255, 255)),
        ("a.webp", (255, 0, 0), (255, 255, 255)),
        ("palette.gif", (255, 0, 0), (255, 255, 255)),
        ("palette.png", (255, 0, 0), (255, 255, 255)),
        ("rgba.png", (255, 0, 0), (255, 255, 255)),
        ("grey.png", (76, 76, 76), (255, 255, 255)),
        ("la.png", (76, 76, 76), (255, 255, 255)),
        ("deep.png", (76, 76, 76), (255, 255, 255)),
        ("bilevel.png", None, (255, 255, 255)),
        ("cmyk.jpg", (255, 0, 0), (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    folder: Path, name: str, left: tuple[int, int, int] | None, right: tuple[int, int, int]
) -> None:
    example = one(folder, image=name)
    assert example.images == (folder / name,)
    image = open_image(folder / name)
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    lossy = 3 if name.endswith(".jpg") else 0
    np.testing.assert_allclose(image.getpixel((35, 10)), right, atol=lossy)
    if left is not None:
        np.testing.assert_allclose(image.getpixel((5, 10)), left, atol=lossy)


def test_sixteen_bits_are_rounded_to_eight() -> None:
    deep = np.array([[0, 128, 129, 257, 32767, 65406, 65407, 65535]], dtype=np.uint16)
    assert np.asarray(open_image(Image.fromarray(deep)))[0, :, 0].tolist() == [
        0,
        0,
        1,
        1,
        127,
        254,
        255,
        255,
    ]


def test_boxes_are_in_the_upright_image(folder: Path) -> None:
    # 40 x 20 in the file, 20 x 40 upright, its left half now below.
    image = open_image(folder / "turned.jpg")
    assert image.size == (20, 40)
    np.testing.assert_allclose(image.getpixel((10, 35)), (255, 0, 0), atol=9)
    assert one(folder, image="turned.jpg", boxes=[[0, 20, 20, 40]]).boxes == (Box(0, 20, 20, 40),)
    with pytest.raises(DataError, match="is outside the image of 20 x 40 pixels"):
        one(folder, image="turned.jpg", boxes=[[20, 0, 40, 20]])


def test_all_fields(folder: Path) -> None:
    row = {
        "images": ["a.png", "turned.jpg"],
        "question": "<image>What is in <image>?",
        "boxes": [[1, 2, 11.5, 12], {"image": 1, "box": [0, 0, 20, 40]}],
        "teacher_images": ["b.png", "a.webp"],
        "teacher_question": "What is it?",
        "answer": "B",
        "choices": ["a cat", "a dog"],
        "id": 7,
        "weight": 0.5,
        "category": "animals",
    }
    (example,) = read_dataset(write(folder, "", row))
    assert example == Example(
        id="7",
        images=(folder / "a.png", folder / "turned.jpg"),
        question="<image>What is in <image>?",
        boxes=(Box(1, 2, 11.5, 12), Box(0, 0, 20, 40, image=1)),
        teacher_images=(folder / "b.png", folder / "a.webp"),
        teacher_question="What is it?",
        answer="B",
        choices=("a cat", "a dog"),
        weight=0.5,
        source="data.jsonl:2",
    )


def test_defaults_and_nulls(folder: Path) -> None:
    optional = (
        "images",
        "box_format",
        "teacher_image",
        "teacher_images",
        "teacher_question",
        "answer",
        "choices",
        "id",
        "weight",
    )
    expected = Example(
        "data.jsonl:1", (folder / "a.png",), "What?", (Box(1, 2, 11, 12),), source="data.jsonl:1"
    )
    assert one(folder) == expected
    assert one(folder, **dict.fromkeys(optional)) == expected
    given = one(folder, boxes=[], teacher_image="b.png", answer=7.5)
    assert (given.boxes, given.teacher_images, given.answer) == ((), (folder / "b.png",), "7.5")


@pytest.mark.parametrize(
    ("unit", "box", "expected"),
    [
        ("pixels", [4, 5, 20, 15], Box(4, 5, 20, 15)),
        # within the tolerance; the view cuts it off
        ("pixels", [-1, 0, 41, 20.5], Box(-1, 0, 41, 20.5)),
        ("fraction", [0.1, 0.25, 0.5, 0.75], Box(4, 5, 20, 15)),
        ("fraction", [0, 0, 1, 1], Box(0, 0, 40, 20)),
        # a rounding error outside is cut
        ("fraction", [-1e-9, 0, 1.0000001, 1], Box(0, 0, 40, 20)),
        ("fraction", [0, -0.0004, 0.5, 1.0005], Box(0, 0, 20, 20)),
        ("per-mille", [-0.5, 0, 1000.4, 500], Box(0, 0, 40, 10)),
        ("per-mille", [100, 250, 500, 750], Box(4, 5, 20, 15)),
    ],
)
def test_box_formats(folder: Path, unit: str, box: list[float], expected: Box) -> None:
    assert one(folder, boxes=[box], box_format=unit).boxes == (expected,)
    header = write(
        folder,
        {"box_format": unit},
        {**GOOD, "boxes": [box]},
        {**GOOD, "boxes": [[4, 5, 20, 15]], "box_format": "pixels"},
    )
    assert [example.boxes for example in read_dataset(header, strict=True)] == [
        (expected,),
        (Box(4, 5, 20, 15),),
    ]


OTHER = '; if its unit is another one, say "box_format":'
ROW_FAULTS: list[tuple[Any, str]] = [
    ('{"image": "a.png",', "not JSON: Expecting property name"),
    ("[1, 2]", "a row is a JSON object, but this is a list"),
    ("null", "a row is a JSON object, but this is null"),
    ("[" * 100_000, "not JSON: maximum recursion depth"),
    ({"image": None}, "field 'image' is missing: a path"),
    (
        {"image": None, "img": "a.png"},
        "field 'image' is missing: a path, or images: a list of paths",
    ),
    ({"image": ""}, "field 'image': \"\" is not a path"),
    ({"image": 5}, "field 'image': 5 is not a path"),
    ({"image": ["a.png"]}, "field 'image': [\"a.png\"] is not a path"),
    ({"images": ["a.png"]}, "fields 'image' and 'images': give one of them, not both"),
    ({"image": None, "images": "a.png"}, "field 'images': \"a.png\" is not a list of paths"),
    (
        {"image": None, "images": ["a.png", 3]},
        "field 'images': 3 is not a path, bytes, base64 or a URL",
    ),
    ({"image": "nowhere.png"}, "field 'image': image not found: "),
    ({"image": "."}, "field 'image': image not found: "),
    ({"image": "truncated.jpg"}, "truncated.jpg: image file is truncated"),
    ({"image": "text.png"}, "text.png: not an image, or of an unknown format"),
    ({"image": "empty.png"}, "empty.png: not an image, or of an unknown format"),
    ({"image": "float.tiff"}, "float.tiff: floating-point pixels have no agreed range"),
    (
        {"image": "integer.tiff"},
        "integer.tiff: integer pixels outside 0..65535 have no agreed range",
    ),
    ({"question": None}, "field 'question' is missing: a text"),
    (
        {"question": None, "qestion": "What?"},
        "field 'question' is missing: a text (the row has 'qestion'; did you mean 'question'?)",
    ),
    ({"question": " "}, "field 'question': \" \" is not a text that is not empty"),
    ({"question": ["What?"]}, "field 'question': [\"What?\"] is not a text that is not empty"),
    ({"question": "<image><image>"}, "field 'question': 2 '<image>' markers for 1 image"),
    (
        {"teacher_question": "<image><image>"},
        "field 'teacher_question': 2 '<image>' markers for 1 teacher image",
    ),
    (
        {"boxes": None},
        (
            "field 'boxes' is missing: the evidence as [[left, top, right, bottom], ...], or"
            " teacher_image: a path"
        ),
    ),
    ({"boxes": []}, "field 'boxes' is missing"),
    ({"boxes": None, "bboxes": []}, "(the row has 'bboxes'; did you mean 'boxes'?)"),
    ({"boxes": {}}, "field 'boxes': {} is not a list of boxes"),
    (
        {"boxes": [1, 2, 11]},
        "field 'boxes': [1, 2, 11] is not a box of four numbers, [left, top, right, bottom]",
    ),
    ({"boxes": [[1, 2, 11]]}, "field 'boxes': [1, 2, 11] is not a box of four numbers"),
    ({"boxes": [[1, 2, 11, "12"]]}, "is not a box of four numbers"),
    ({"boxes": [[1, 2, 11, True]]}, "is not a box of four numbers"),
    ({"boxes": [[1, 2, 11, float("nan")]]}, "field 'boxes': box [1, 2, 11, NaN] is not finite"),
    ({"boxes": [[1, 2, 11, 10**400]]}, "is not finite"),
    ({"boxes": [[11, 2, 1, 12]]}, "field 'boxes': box [11, 2, 1, 12] is empty or inverted"),
    ({"boxes": [[1, 2, 1, 12]]}, "is empty or inverted"),
    (
        {"boxes": [[1, 2, 42, 12]]},
        f'box [1, 2, 42, 12] is outside the image of 40 x 20 pixels{OTHER} "per-mille"',
    ),
    ({"boxes": [[1, -2, 11, 12]]}, "is outside the image of 40 x 20 pixels"),
    ({"boxes": [[40, 2, 41, 12]]}, "is outside the image of 40 x 20 pixels"),
    ({"boxes": [[-1, 2, 0, 12]]}, "is outside the image of 40 x 20 pixels"),
    (
        {"boxes": [[0.1, 0.2, 0.5, 0.6]]},
        f'is at most one pixel in the image\'s corner{OTHER} "fraction"',
    ),
    (
        {"boxes": [[1, 2, 11, 12]], "box_format": "fraction"},
        f'is outside 0..1, the range of fraction{OTHER} "pixels" or "per-mille"',
    ),
    (
        {"boxes": [[1, 2, 1001, 12]], "box_format": "per-mille"},
        "box [1, 2, 1001, 12] is outside 0..1000, the range of per-mille",
    ),
    (
        {"boxes": [[0, 0, 1000.6, 12]], "box_format": "per-mille"},
        "is outside 0..1000, the range of per-mille",
    ),
    (
        {"boxes": [[0, -0.001, 1, 1]], "box_format": "fraction"},
        "is outside 0..1, the range of fraction",
    ),
    (
        {"boxes": [[1, 2, 1.0004, 12]], "box_format": "fraction"},
        "is outside 0..1, the range of fraction",
    ),
    (
        {"boxes": [[0.1, 0.2, 0.5, 0.6]], "box_format": "per-mille"},
        f'is at most one thousandth in the image\'s corner{OTHER} "fraction"',
    ),
    (
        {"boxes": [{"image": 1, "box": [1, 2, 11, 12]}]},
        "image 1 of box [1, 2, 11, 12] is not among the row's 1 image, counted from 0",
    ),
    (
        {"boxes": [{"image": False, "box": [1, 2, 11, 12]}]},
        "image false of box [1, 2, 11, 12] is not among",
    ),
    (
        {"boxes": [{"image": -1, "box": [1, 2, 11, 12]}]},
        "image -1 of box [1, 2, 11, 12] is not among",
    ),
    ({"boxes": [{"box": [1, 2]}]}, "is not a box of four numbers"),
    (
        {"box_format": "permille"},
        "field 'box_format': unknown value \"permille\"; did you mean 'per-mille'?",
    ),
    ({"box_format": ["pixels"]}, "field 'box_format': unknown value [\"pixels\"]"),
    ({"teacher_image": "nowhere.png"}, "field 'teacher_image': image not found: "),
    ({"teacher_image": 1}, "field 'teacher_image': 1 is not a path"),
    ({"answer": [["7"]]}, "field 'answer': [\"7\"] is not a text or a number, or a list of them"),
    ({"answer": ["7", ""]}, "field 'answer': \"\" is not a text or a number"),
    (
        {"answer": ["A", "C"], "choices": ["cat", "dog"]},
        "field 'answer': \"C\" is neither a letter nor the text of one of the 2 choices",
    ),
    ({"answer": {"text": "7"}}, 'field \'answer\': {"text": "7"} is not a text or a number'),
    (
        {"answer": "E", "choices": ["cat", "dog"]},
        "field 'answer': \"E\" is neither a letter nor the text of one of the 2 choices",
    ),
    ({"choices": "cat"}, "field 'choices': \"cat\" is not a list of texts"),
    ({"choices": ["cat", 3]}, "field 'choices': [\"cat\", 3] is not a list of texts"),
    ({"id": ""}, "field 'id': \"\" is not a text or a whole number"),
    ({"id": [1]}, "field 'id': [1] is not a text or a whole number"),
    ({"weight": -1}, "field 'weight': -1 is not a number of at least 0"),
    ({"weight": "1"}, "field 'weight': \"1\" is not a number of at least 0"),
    ({"weight": float("inf")}, "field 'weight': Infinity is not a number of at least 0"),
]


@pytest.mark.parametrize(
    ("fault", "message"), ROW_FAULTS, ids=[message[:50] for _, message in ROW_FAULTS]
)
def test_a_faulty_row_is_skipped_and_counted_and_fatal_where_it_must_be(
    folder: Path, fault: Any, message: str
) -> None:
    bad = fault if isinstance(fault, str) else {**GOOD, **fault}
    path = write(folder, {**GOOD, "id": "first"}, bad, {**GOOD, "id": "last"})
    data = read_dataset(path)
    assert [example.id for example in data] == ["first", "last"]
    ((source, reason),) = data.skipped
    assert source == "data.jsonl:2"
    assert message in reason
    assert "\n" not in reason
    assert len(reason) < 400

    with pytest.raises(DataError) as strict:
        read_dataset(path, strict=True)
    assert str(strict.value) == f"{path}:2: {reason} (a faulty row is fatal in strict mode)"

    with pytest.raises(DataError) as alone:
        read_dataset(write(folder, bad, bad))
    assert (
        str(alone.value)
        == f"{path}: no usable row of 2; the first fault, in data.jsonl:1: {reason}"
    )


def test_a_picture_above_the_bound_is_a_faulty_row(folder: Path) -> None:
    path = write(folder, GOOD)
    assert len(read_dataset(path, max_image_pixels=800)) == 1
    with pytest.raises(
        DataError,
        match=r"a.png: 40 x 20 = 800 pixels, above data.max_image_pixels = 799; raise it for",
    ):
        read_dataset(path, max_image_pixels=799)


FILE_FAULTS: list[tuple[bytes | None, str]] = [
    (None, "data file not found: {path}"),
    (b"", "{path}: the file is empty"),
    (b" \n\r\n", "{path}: the file is empty"),
    (
        b'{"a": 1}\n{"b": "caf\xe9"}\n',
        "{path}:2: the file is not UTF-8 text (byte 0xe9); save it as UTF-8",
    ),
    (b'{"box_format": "pixels"}\n', "{path}: no usable row of 0"),
    (
        b'{"box_format": "inches"}\n{}\n',
        "{path}:1: field 'box_format': unknown value \"inches\"; did you mean 'pixels'?",
    ),
    (
        b'{"box_format": "pixels"\n{}\n',
        "{path}:1: not JSON: Expecting ',' delimiter: line 1 column 24 (char 23)",
    ),
]


@pytest.mark.parametrize(
    ("content", "message"), FILE_FAULTS, ids=[message for _, message in FILE_FAULTS]
)
def test_a_faulty_file_is_fatal(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_data(str(path))
    assert str(caught.value) == message.format(path=path)


def test_a_folder_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder without data: it holds no file"):
        open_data(str(tmp_path))


def test_line_ends_inside_texts_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    row = json.dumps({**GOOD, "question": "a\u2028b\u0085c"}, ensure_ascii=False)
    path = folder / "data.jsonl"
    path.write_bytes(f"\ufeff{row}\r\n\r\n{row}".encode())
    data = read_dataset(path, strict=True)
    assert [(example.question, example.source) for example in data] == [
        ("a\u2028b\u0085c", "data.jsonl:1"),
        ("a\u2028b\u0085c", "data.jsonl:3"),
    ]


def test_rows_keep_their_order(folder: Path) -> None:
    data = read_dataset(
        write(
            folder,
            *(
                {**GOOD, "id": number, "image": ("a.png", "turned.jpg")[number % 2]}
                for number in range(60)
            ),
        )
    )
    assert [example.id for example in data] == [str(number) for number in range(60)]
    assert isinstance(data[10:12], tuple)
    assert [example.id for example in data[10:12]] == ["10", "11"]
    assert data[-1].id == "59"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["green", "Green"], ("green", "Green")),
        ([7, 7.5, "seven"], ("7", "7.5", "seven")),
        (["red"], "red"),
        ([], None),
    ],
)
def test_several_reference_answers(folder: Path, given: Any, expected: Any) -> None:
    assert one(folder, answer=given).answer == expected


def test_several_reference_answers_among_choices(folder: Path) -> None:
    assert one(folder, answer=["A", "a dog"], choices=["a cat", "a dog"]).answer == ("A", "a dog")
    with pytest.raises(DataError, match="field 'choices': 27 choices; at most 26 have a letter"):
        one(folder, choices=[str(number) for number in range(27)])


def test_fingerprint_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, *rows: Any) -> str:
        return read_dataset(write(folder, *rows)).fingerprint

    before = fingerprint(folder, GOOD)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert fingerprint(tmp_path, GOOD) == before
    assert len(before) == 64
    assert fingerprint(tmp_path, {**GOOD, "question": "Where?"}) != before
    with_teacher = fingerprint(tmp_path, {**GOOD, "teacher_image": "b.png"})
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "b.png")
    assert fingerprint(tmp_path, {**GOOD, "teacher_image": "b.png"}) != with_teacher
    assert fingerprint(tmp_path, GOOD) == before
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    assert fingerprint(tmp_path, GOOD) != before


def test_unlabelled_data_has_no_answers(folder: Path) -> None:
    path = write(folder, {**GOOD, "answer": "B", "choices": ["cat", "dog"]}, {})
    labelled, unlabelled = open_data(str(path)), open_data(str(path), labelled=False)
    assert isinstance(labelled, Dataset)
    assert isinstance(unlabelled, Dataset)
    assert (labelled[0].answer, unlabelled[0].answer) == ("B", None)
    assert unlabelled[0].choices == labelled[0].choices == ("cat", "dog")
    assert unlabelled.skipped == labelled.skipped != []
    assert unlabelled.fingerprint == labelled.fingerprint


def test_tiny_is_the_embedded_task() -> None:
    data = open_data("tiny")
    assert len(data) == 12800
    assert data[0].answer is not None
    assert open_data("tiny", labelled=False)[0].answer is None


def test_options() -> None:
    options = DataOptions()
    assert (options.path, options.strict) == ("tiny", False)
    for wrong in ({"path": ""}, {"formatt": "opd"}, {"max_prompt_tokens": 0}, {"pathh": "a"}):
        with pytest.raises(ValidationError):
            DataOptions.model_validate(wrong)


def test_options_of_reading() -> None:
    options = DataOptions()
    assert not any(getattr(options, name) for name in Reading.model_fields), (
        "nothing is said of a file by default"
    )
    with pytest.raises(ValidationError, match="no field is called 'questoin'; did you mean"):
        DataOptions.model_validate({"columns": {"questoin": "prompt"}})
    with pytest.raises(ValidationError, match="no unit of boxes has this name; did you mean"):
        DataOptions.model_validate({"box_format": "pixel"})
